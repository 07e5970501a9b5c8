"""Every verb that loads a checkpoint runs code of its own with --trust-remote-code, and says so first."""

import json

import numpy as np
import pytest
import torch

from cli.against import InTorch
from models.checkpoints import load_model, own_code
from models.moe_layers import find_moe_layers
from moe_spec.identity import checkpoint_sha256
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from runtime.measuring.memory import Alone
from tests.cli.helpers import invoke, leftovers
from tests.models_table import example_inputs
from tests.oracle import masked
from tests.own_code import FILES

TRUST = "--trust-remote-code"


def loud(*checkpoints):
    """What stderr says before code runs."""
    return "".join(
        f"warning: {checkpoint} runs code of its own, with your rights on this machine:\n"
        + "".join(f"warning:   {sha256}  {name}\n" for name, sha256 in own_code(checkpoint).items())
        for checkpoint in checkpoints
    )


def refused(checkpoint):
    """What stderr says where its code may not run."""
    return (
        f"error: {checkpoint} is a 'own_moe', which code of its own defines: {', '.join(FILES)}\n"
        "hint: read these files; where you trust them, --trust-remote-code runs them (in Python "
        "trust_remote_code=True)\n"
    )


def trusted(verb, checkpoint, *arguments, others=()):
    """Stdout of a verb that may run the code of ``checkpoint``."""
    code, stdout, stderr = invoke(verb, checkpoint, *arguments, TRUST)
    assert (code, stderr) == (0, loud(checkpoint, *others))
    return stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    ids = np.random.default_rng(0).integers(3, 128, (4, 6))
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids))
    return path


@pytest.fixture(scope="module")
def plan(own_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    trusted("plan", own_checkpoint, "--experts", "0,2,5", "-o", path)
    return path


@pytest.fixture(scope="module")
def exported(own_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "exported"
    trusted("export", own_checkpoint, "--no-cache", "-o", path)
    return path


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("inspect", ()),
        ("calibrate", ("--data", "DATA", "-o", "OUT")),
        ("plan", ("--criterion", "aimer", "--keep", "4", "-o", "OUT")),
        ("plan", ("--data", "DATA", "--keep", "4", "-o", "OUT")),
        ("prune", ("--plan", "PLAN", "-o", "OUT")),
        ("finetune", ("--data", "DATA", "-o", "OUT")),
        ("export", ("-o", "OUT")),
        ("verify", ("--reference", "EXPORTED")),
    ],
)
def test_unasked_nothing_runs(verb, arguments, own_checkpoint, data, plan, exported, tmp_path):
    given = {"DATA": data, "PLAN": plan, "EXPORTED": exported, "OUT": tmp_path / "out"}
    assert invoke(verb, own_checkpoint, *(given.get(argument, argument) for argument in arguments)) == (
        1,
        "",
        refused(own_checkpoint),
    )
    assert leftovers(tmp_path) == set()


def test_it_is_inspected_calibrated_and_planned_for(own_checkpoint, data, tmp_path):
    assert "model.layers.1.mlp: 8 experts, K=2, MixtralTopKRouter" in trusted("inspect", own_checkpoint)
    trusted("calibrate", own_checkpoint, "--data", data, "-o", tmp_path / "statistics.safetensors")
    for name, options in {
        "on-data": ("--data", data, "--keep", "4"),
        "by-size": ("--data", data, "--max-size", "80%"),
        "aimer": ("--criterion", "aimer", "--keep", "4"),
        "random": ("--criterion", "random", "--keep", "4"),
    }.items():
        trusted("plan", own_checkpoint, *options, "-o", tmp_path / name)
        assert PruningPlan.load(tmp_path / name).model_sha256 == checkpoint_sha256(own_checkpoint)


def test_what_is_pruned_takes_its_code_along_and_loads_again(own_checkpoint, plan, tmp_path):
    out = tmp_path / "pruned"
    trusted("prune", own_checkpoint, "--plan", plan, "-o", out)
    assert own_code(out) == own_code(own_checkpoint)
    whole, pruned = (load_model(path, trust_remote_code=True) for path in (own_checkpoint, out))
    assert [layer.num_experts for layer in find_moe_layers(pruned)] == [3, 3]
    inputs = example_inputs(whole, batch=2, sequence=5, seed=0)
    with torch.no_grad(), masked(whole, PruningPlan.load(plan)):
        torch.testing.assert_close(pruned(**inputs).logits, whole(**inputs).logits, rtol=0, atol=1e-5)


def test_what_is_fine_tuned_takes_its_code_along_and_a_teacher_runs_its_own(own_checkpoint, data, plan, tmp_path):
    student, out = tmp_path / "student", tmp_path / "tuned"
    trusted("prune", own_checkpoint, "--plan", plan, "-o", student)
    distil = ("--method", "router-kd", "--teacher", own_checkpoint, "--steps", "1", "--data", data)
    trusted("finetune", student, *distil, "-o", out, others=[own_checkpoint])
    assert own_code(out) == own_code(own_checkpoint)
    assert type(load_model(out, trust_remote_code=True)).__name__ == "OwnForCausalLM"


def test_an_export_is_compared_with_what_its_code_computes_and_lists_it(own_checkpoint, plan, tmp_path):
    out = tmp_path / "exported"
    written = trusted("export", own_checkpoint, "--plan", plan, "--no-cache", "-o", out, "--json")
    details = json.loads(written)["details"]
    assert details == Manifest.load(out).details
    assert details["own_code"] == own_code(own_checkpoint)
    assert max(entry["max_rel"] for entry in details["parity_with_torch"]) < 1e-5
    assert not set(FILES) & leftovers(out)


def test_an_export_is_verified_by_what_its_code_computes_and_timed_beside_it(own_checkpoint, exported, monkeypatch):
    assert json.loads(trusted("verify", own_checkpoint, "--reference", exported, "--json"))["passed"] is True
    monkeypatch.setattr(InTorch, "alone", lambda *_: Alone(load_ms=1.0, peak_bytes=None))
    quickly = ("--batch-size", 1, "--repeats", 1, "--warmup", 0, "--json")
    timed = ("bench", exported, "--against", "torch", "--checkpoint", own_checkpoint, *quickly)
    code, _, stderr = invoke(*timed)
    assert (code, stderr.splitlines()[-2:]) == (1, refused(own_checkpoint).splitlines())
    code, stdout, stderr = invoke(*timed, TRUST)
    assert (code, stderr) == (0, loud(own_checkpoint))
    assert [row["model"] for row in json.loads(stdout)["rows"]] == [str(exported), f"torch {own_checkpoint}"]


def test_the_option_is_for_checkpoints(data, tmp_path):
    exported = tmp_path / "model.onnx"
    assert invoke("calibrate", exported, "--data", data, "-o", tmp_path / "out", TRUST) == (
        1,
        "",
        f"error: --trust-remote-code is for checkpoints, {exported} is an ONNX model\n"
        "hint: calibrate the checkpoint, or parts of the data one by one: moe-edge merge adds them up\n",
    )


def test_without_code_of_its_own_a_checkpoint_is_as_it_was(zoo, tmp_path):
    code, stdout, stderr = invoke("inspect", zoo.checkpoint("mixtral"), TRUST)
    assert (code, stderr) == (0, "")
    assert "8 experts" in stdout
