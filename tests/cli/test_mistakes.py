"""Paths that cannot be: every verb says so before it works, with a name that would do, and leaves nothing."""

import pytest

from models.vmoe.assets import fashion_mnist
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from tests.cli.helpers import invoke, leftovers

NEEDS = {
    "inspect": ("model",),
    "targets": ("model",),
    "upcycle": ("model", "-o", "new"),
    "calibrate": ("model", "--data", "data.npz", "-o", "new"),
    "merge": ("model", "-o", "new"),
    "plan": ("model", "--keep", "4", "-o", "new"),
    "prune": ("model", "--plan", "plan.json", "-o", "new"),
    "finetune": ("model", "--data", "data.npz", "-o", "new"),
    "export": ("model", "-o", "new"),
    "optimize": ("model", "-o", "new"),
    "build": ("model", "--target", "cpu", "-o", "new"),
    "bundle": ("model", "--target", "cpu", "-o", "new"),
    "verify": ("model", "--reference", "model", "-o", "new"),
    "bench": ("model", "-o", "new"),
    "run": ("model", "--input", "data.npz", "-o", "new.npz"),
    "report": ("model", "-o", "new"),
    "demo": ("-o", "new"),
}
"""What each verb cannot do without; ``new`` is not there."""

EXPECTED = {
    "inspect": "a directory or a file that moe-edge makes or reads",
    "merge": "statistics (safetensors)",
    "optimize": "an ONNX file or a model directory",
    "plan": "statistics (safetensors)",
    "report": "a directory with artifacts",
    "verify": "an ONNX file or a model directory",
} | dict.fromkeys(("bench", "build", "bundle", "run", "targets"), "an .onnx file or a model directory")
CHECKPOINT = "a checkpoint directory"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    PruningPlan("0" * 64, "by hand", (LayerPlan("mlp", 8, 2, (0, 1)),)).save(tmp_path / "plan.json")
    (tmp_path / "data.npz").symlink_to(fashion_mnist() / "test.npz")
    yield
    assert leftovers(tmp_path) == {"file", "plan.json", "data.npz"}
    assert (tmp_path / "file").read_text() == "mine"


def words(verb, **instead):
    return [instead.get(word.split(".")[0], word) for word in NEEDS[verb]]


@pytest.mark.parametrize("verb", [verb for verb in NEEDS if "model" in NEEDS[verb]])
def test_a_model_that_is_not_there_is_named_before_anything_else(verb):
    code, out, err = invoke(verb, *words(verb))
    expected = EXPECTED.get(verb, CHECKPOINT)
    hint = "moe-edge demo -o demo-output" if verb == "report" else "check the path"
    assert (code, out) == (1, "")
    assert err == f"error: model does not exist, expected {expected}\nhint: {hint}\n"


@pytest.mark.parametrize("verb", [verb for verb in NEEDS if "-o" in NEEDS[verb]])
def test_nothing_is_written_into_a_file(verb, here, tmp_path):
    given = "file/new.npz" if verb == "run" else "file/new"
    assert invoke(verb, *words(verb, new=given)) == (
        1,
        "",
        f"error: {given} cannot be written: {tmp_path / 'file'} is a file\nhint: give another -o\n",
    )
