import json
import re

import pytest

from cli import console
from runtime.model_dir import model_bytes
from runtime.targets import PLUGINS, TARGETS
from tests.cli.helpers import done, invoke
from tests.runtime import tiny


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def test_the_table_names_every_device_and_every_plugin():
    shown = done("targets")
    assert shown.startswith(f"{len(TARGETS)} targets of graphs, {len(PLUGINS)} of checkpoints")
    first_words = {line.split()[0] for line in shown.splitlines() if line.split()}
    assert first_words >= {target.name for target in TARGETS} | {plugin.kernels.target for plugin in PLUGINS}


def test_machines_get_the_rows():
    table = json.loads(done("targets", "--json"))
    assert set(table) == {target.name for target in TARGETS} | {plugin.kernels.target for plugin in PLUGINS}
    assert table["rtx-ada"]["compute_capability"] == "8.9"
    assert table["edge-llm-fp16"]["kernels"] == {"target": "edge-llm-fp16", "counts": [128, 256], "max_top_k": 8}
    assert set(json.loads(done("targets", "--target", "h200", "--json"))) == {"h100"}


def test_a_model_is_told_which_targets_take_it_and_why_not(model):
    (model / "manifest.json").write_text((model / "manifest.json").read_text().replace('"dense"', '"sorted"'))
    shown = done("targets", model)
    assert shown.startswith(f"{model}: 3 of {len(TARGETS)} targets take it; needs over ")
    assert "rtx-ada: layer blocks.0.moe has the form 'sorted', rtx-ada takes dense, gather, ffn\n" in shown


def test_memory_and_shapes_are_given(model):
    arguments = ("--target", "jetson-orin", "--memory", 0.001, "--maxShapes=x:1000x100x8", "--json")
    row = json.loads(done("targets", model, *arguments))["jetson-orin"]
    assert row["tensors"] == 1000 * (100 * 8 + 3) * 4
    assert (row["memory"], row["fits"]) == ([1_000_000, 1_000_000], "no")


def test_an_unknown_target_is_answered_with_the_closest():
    code, _, stderr = invoke("targets", "--target", "jetson-orim")
    assert (code, stderr.splitlines()[0]) == (1, "error: unknown target 'jetson-orim'")


def test_a_build_that_the_device_cannot_hold_without_swap_is_told(model):
    shown = done("targets", model, "--target", "jetson-orin", "--memory", 0.00001)
    assert shown.splitlines()[-2].split() == ["jetson-orin", "yes", "1e-05", "no", "needs", "swap"]


def test_what_a_model_needs_is_said_once(model):
    first, *table = done("targets", model).splitlines()
    weights = model_bytes(model)
    assert re.fullmatch(
        rf".*; needs over \S+ \w+: {weights / 1000:.1f} KB of weights, 0 of cache, \S+ \w+ of inputs and outputs, and "
        rf"activations, which its engine will tell; building takes {3 * weights / 1000:.1f} KB",
        first,
    )
    assert max(map(len, table)) <= 80


def test_a_table_fits_the_terminal(monkeypatch):
    monkeypatch.setattr(console, "out", type(console.out)(width=40, highlight=False))
    shown = done("targets")
    assert max(map(len, shown.splitlines()[1:])) <= 40
    assert "…" not in shown


@pytest.mark.parametrize(("option", "value"), [("--memory", "8"), ("--maxShapes", "x:1x8")])
def test_what_is_asked_of_a_model_needs_one(option, value):
    assert invoke("targets", option, value) == (
        1,
        "",
        f"error: {option} is about a model, but there is none\nhint: moe-edge targets MODEL {option} ...\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--maxShapes=x:1x",),
            "--maxShapes=x:1x: cannot read 'x:1x'\nhint: give NAME:DIMxDIM,... as trtexec does, e.g. "
            "--minShapes=x:1x3x8,y:1",
        ),
        (("--memory", "inf"), "--memory is inf, expected a number of GB\nhint: leave it out for what the makers say"),
    ],
)
def test_what_cannot_be_read_is_named_as_it_was_given(arguments, message, model):
    assert invoke("targets", model, *arguments) == (1, "", f"error: {message}\n")
