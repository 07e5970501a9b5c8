import json

from cli import console
from models import support
from models.support import STAGES
from tests.cli.helpers import invoke


def test_the_table_has_a_line_a_family_and_counts():
    code, stdout, stderr = invoke("families")
    assert (code, stderr) == (0, "")
    rows = support.families()
    assert stdout.startswith(f"{len(rows)} families: {sum(row.reason('read') is None for row in rows)} read, ")
    lines = [line.split() for line in stdout.splitlines()]
    for row in rows:
        marks = ["x" if row.reason(stage) is None else "-" for stage in STAGES]
        assert [row.model_type, *marks] in lines


def test_80_columns_show_every_heading(monkeypatch):
    monkeypatch.setattr(console, "out", type(console.out)(width=80, highlight=False))
    table = invoke("families")[1].splitlines()[2:]
    assert max(map(len, table)) <= 80
    headings = " ".join(table[: next(at for at, line in enumerate(table) if "───" in line)]).split()
    assert sorted(headings) == sorted(["family", *" ".join(STAGES).replace("-", "- ").split()])


def test_one_family_says_what_was_proven_and_why_the_rest_was_not():
    code, stdout, stderr = invoke("families", "jamba")
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0] == "jamba: JambaForCausalLM"
    assert lines[1] == "  read: yes, E and K of every MoE layer of a checkpoint are what its config says"
    assert "  exported: no, torch.onnx cannot trace JambaForCausalLM: ValueError: " in stdout
    assert lines[-1] == "  TensorRT-RTX: no, not exported"


def test_what_is_no_family_says_why():
    assert invoke("families", "zaya")[1].splitlines()[:2] == [
        "zaya: no model was made",
        "  read: no, its router is an MLP that reads the one before it, and has a row for tokens that skip all experts",
    ]


def test_machines_get_the_reasons():
    table = json.loads(invoke("families", "--json")[1])
    assert set(table) == {row.model_type for row in support.families()}
    assert table["mixtral"]["exported"] is None
    assert table["mixtral"] == json.loads(invoke("families", "mixtral", "--json")[1])


def test_an_unknown_family_is_refused_with_the_nearest():
    known = ", ".join(row.model_type for row in support.families())
    error = "error: 'mixtrl' is no family that moe-edge has looked at"
    assert invoke("families", "mixtrl") == (1, "", f"{error}\nhint: did you mean 'mixtral'? known: {known}\n")
