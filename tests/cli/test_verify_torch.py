"""The checkpoint itself as the reference: torch runs it, and its routers are seen."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.planted import FAULTS, plant
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from pruning.prune import prune
from tests.cli.helpers import invoke


def save_plan(parent, keep, directory):
    plan, manifest = directory / f"keep-{len(keep)}.json", Manifest.load(parent)
    layers = tuple(LayerPlan(block.name, 8, 2, keep) for block in manifest.blocks)
    PruningPlan(manifest.source_sha256, "manual", layers).save(plan)
    return plan


def pruned_checkpoint(checkpoint, parent, directory):
    """With experts 1 and 5 of each layer."""
    return prune(checkpoint, save_plan(parent, (1, 5), directory), directory / "pruned")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_an_export_computes_and_chooses_as_its_checkpoint_does(zoo, name):
    code, out, err = invoke("verify", zoo.exported(name), "--reference", zoo.checkpoint(name), "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert [layer["flips"] for layer in report["layers"]] == [0, 0]
    assert all(layer["gate_error"] < 1e-5 for layer in report["layers"])
    assert report["outputs"][0]["forced_max_rel"] < 1e-5


def test_decoders_go_on_from_their_caches_in_torch_too(zoo):
    report = json.loads(invoke("verify", zoo.cached("mixtral"), "--reference", zoo.decoder("mixtral"), "--json")[1])
    assert (report["passed"], report["greedy"]["shortest"]) == (True, 16)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.ones((2, 4), np.int64)}, "inputs are ids, expected attention_mask, input_ids"),
        (
            {"input_ids": np.ones((2, 4), np.float32), "attention_mask": np.ones((2, 4), np.int64)},
            "input input_ids is float32[2, 4], expected int64[batch_size, sequence_length]",
        ),
    ],
)
def test_data_that_torch_would_fail_on_is_refused_by_its_name(zoo, tmp_path, arrays, message):
    data = tmp_path / "data.npz"
    np.savez(data, **arrays)
    sides = [zoo.exported("mixtral"), zoo.checkpoint("mixtral")]
    for candidate, reference in (sides, sides[::-1]):
        code, _, err = invoke("verify", candidate, "--reference", reference, "--data", data)
        assert (code, err.splitlines()[0]) == (1, f"error: {data}: {message}")


def test_a_checkpoint_is_no_reference_of_a_pruned_model(zoo, tmp_path):
    plan = tmp_path / "plan.json"
    layers = tuple(LayerPlan(block.name, 8, 2, (0, 1)) for block in Manifest.load(zoo.exported("mixtral")).blocks)
    PruningPlan("0" * 64, "manual", layers).save(plan)
    checkpoint = zoo.checkpoint("mixtral")
    code, _, err = invoke("verify", zoo.exported("mixtral"), "--reference", checkpoint, "--plan", plan)
    assert (code, err) == (
        1,
        f"error: {checkpoint} is a checkpoint, in which no plan is applied\n"
        "hint: export it whole, and give that as --reference: moe-edge export CHECKPOINT -o exported/\n",
    )


def test_a_plan_that_was_made_for_a_checkpoint_and_lies_in_it_was_not_applied_to_it(zoo, tmp_path):
    checkpoint = shutil.copytree(zoo.checkpoint("mixtral"), tmp_path / "checkpoint")
    plan = save_plan(zoo.exported("mixtral"), (1, 5), checkpoint).rename(checkpoint / "plan.json")
    code, _, err = invoke("verify", zoo.exported("mixtral"), "--reference", checkpoint, "--plan", plan)
    assert (code, err.splitlines()[0]) == (1, f"error: {checkpoint} is a checkpoint, in which no plan is applied")


def test_a_pruned_checkpoint_computes_what_its_parents_graph_does_without_the_experts(zoo, tmp_path):
    parent = zoo.exported("mixtral")
    pruned = pruned_checkpoint(zoo.checkpoint("mixtral"), parent, tmp_path)
    code, out, err = invoke("verify", pruned, "--reference", parent, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert [(layer["flips"], len(layer["usage"])) for layer in report["layers"]] == [(0, 8), (0, 8)]
    assert report["outputs"][0]["max_rel"] < 1e-5


def test_a_pruned_checkpoint_is_the_reference_of_the_graph_pruned_alike(zoo, tmp_path):
    parent = zoo.exported("mixtral")
    pruned = pruned_checkpoint(zoo.checkpoint("mixtral"), parent, tmp_path)
    invoke("optimize", parent, "--plan", pruned / "plan.json", "-o", tmp_path / "optimized")
    report = json.loads(invoke("verify", tmp_path / "optimized", "--reference", pruned, "--cost", "--json")[1])
    assert (report["passed"], [layer["flips"] for layer in report["layers"]]) == (True, [0, 0])
    assert [row["model"] for row in report["cost"]] == [f"torch {pruned}", str(tmp_path / "optimized")]
    assert all(row["median_ms"] > 0 and row["memory_bytes"] > 0 for row in report["cost"])


def test_a_pruned_checkpoint_that_computes_something_else_is_caught_and_the_part_named(zoo, tmp_path):
    parent = zoo.exported("mixtral")
    pruned = pruned_checkpoint(zoo.checkpoint("mixtral"), parent, tmp_path)
    weights = load_file(pruned / "model.safetensors")
    (name,) = (name for name in weights if re.search(r"layers\.1\..*experts\.1\.w2\.weight", name))
    weights[name] *= 2
    save_file(weights, pruned / "model.safetensors", metadata={"format": "pt"})
    code, _, err = invoke("verify", pruned, "--reference", parent)
    assert code == 3
    assert "the fault is in expert 5 of layer model.layers.1.mlp" in err


def test_two_checkpoints_do_not_say_how_they_are_called(zoo):
    checkpoint = zoo.checkpoint("mixtral")
    code, _, err = invoke("verify", checkpoint, "--reference", checkpoint)
    assert (code, err) == (
        1,
        f"error: {checkpoint} and {checkpoint} are checkpoints, and only an export says how they are called\n"
        "hint: export one of them: moe-edge export CHECKPOINT -o exported/\n",
    )


def test_a_plan_that_did_not_make_the_checkpoint_is_refused(zoo, tmp_path):
    parent = zoo.exported("mixtral")
    pruned = pruned_checkpoint(zoo.checkpoint("mixtral"), parent, tmp_path)
    code, _, err = invoke("verify", pruned, "--reference", parent, "--plan", save_plan(parent, (1, 5, 6), tmp_path))
    assert (code, err) == (
        1,
        f"error: layer model.layers.0.mlp of {pruned} has 2 experts, and the plan keeps 3\n"
        "hint: give the plan that it was pruned by: --plan\n",
    )


def test_a_router_that_differs_from_the_checkpoints_is_caught(zoo, tmp_path):
    broken = plant(zoo.exported("mixtral"), tmp_path / "broken", FAULTS["one router row of another expert"], 1)
    code, out, err = invoke("verify", broken, "--reference", zoo.checkpoint("mixtral"))
    assert code == 3
    assert "note" not in out
    assert re.search(r"select other experts although the reference's choice was clear", err)
    assert err.endswith(
        "; the fault is in the router of layer model.layers.1.mlp: it scores expert 3 as expert 2 should be\n"
    )


def test_in_an_engine_no_expert_can_be_made_unselectable(zoo, tmp_path):
    parent, engine = zoo.exported("mixtral"), tmp_path / "engine"
    invoke("build", parent, "--target", "onnxruntime-cpu", "-o", engine)
    code, _, err = invoke("verify", parent, "--reference", engine, "--plan", save_plan(parent, (1, 5), tmp_path))
    assert (code, err) == (
        1,
        f"error: {engine} is an engine, in which no expert can be made unselectable\n"
        "hint: give the model that the candidate was made from as --reference\n",
    )
