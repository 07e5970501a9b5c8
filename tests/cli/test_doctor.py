"""`moe-edge doctor` shows what `runtime.doctor` found, on narrow terminals too."""

import json

import pytest

from cli import console
from runtime.doctor import Finding, Health
from tests.cli.helpers import done

WELL = Finding("cpu", works=True, what="computes")
ILL = Finding("cuda", works=False, what="no [driver] here", hint="install 'it[cuda]'")
HEALTH = Health("2 cores", ILL, (WELL,), (WELL, ILL), (ILL,), (WELL,))


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.setattr("runtime.doctor.doctor", lambda _: HEALTH)


def test_json_has_every_finding():
    assert json.loads(done("doctor", "--json")) == json.loads(json.dumps(HEALTH.to_json()))


def test_what_does_not_work_says_why_and_what_to_do():
    lines = [line.rstrip() for line in done("doctor").splitlines()]
    start = lines.index("Providers of ONNX Runtime")
    assert lines[start + 1 : start + 4] == [
        "  cpu             yes  computes",
        "  cuda            no   no [driver] here",
        "                       -> install 'it[cuda]'",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_holds_it(width, monkeypatch):
    monkeypatch.setattr(console.out, "_width", width)
    text = done("doctor")
    assert max(map(len, text.splitlines())) <= width
    assert "install" in text
