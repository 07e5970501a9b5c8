"""An ensemble on its whole way: each member is ranked, pruned, exported and proven by itself."""

import json

import numpy as np
import pytest
import torch

from models.checkpoints import load_model
from moe_spec.plan import PruningPlan
from tests.cli.fine_tuned import save_fine_tuned
from tests.cli.helpers import done, invoke
from tests.models_table import EXPERTS, vmoe_ensemble
from tests.oracle import masked

GROWN = {
    "layers.0.mlp.members.0": (0, 1, 2),
    "layers.0.mlp.members.1": (3, 5, 7),
    "layers.1.mlp.members.0": (1, 4, 6),
    "layers.1.mlp.members.1": (0, 6, 7),
}
"""Experts whose router rows become longer, in each member others."""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """An ensemble before and after fine-tuning, its export, a data set, and the plan that keeps what has grown."""
    directory = tmp_path_factory.mktemp("ensemble")
    ranked = save_fine_tuned(vmoe_ensemble(), GROWN, directory)
    done("export", directory / "tuned", "-o", directory / "exported")
    done("plan", directory / "tuned", *ranked, "-o", directory / "rows.json")
    done("plan", directory / "tuned", *ranked, "--router", "full", "-o", directory / "full.json")
    return directory


def test_members_are_ranked_each_by_itself_and_keep_as_many(work):
    for router in ("rows", "full"):
        assert {layer.name: layer.keep for layer in PruningPlan.load(work / f"{router}.json").layers} == GROWN


def test_a_pruned_ensemble_is_a_checkpoint_that_selects_as_if_the_others_could_not_be(work, tmp_path):
    out = tmp_path / "pruned"
    done("prune", work / "tuned", "--plan", work / "rows.json", "-o", out)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_experts"], config["ensemble_size"]) == (3, 2)
    model, pruned, images = load_model(work / "tuned"), load_model(out), pixels(work)
    with torch.no_grad(), masked(model, PruningPlan.load(work / "rows.json")):
        expected = model(images).logits
    torch.testing.assert_close(pruned(images).logits, expected, rtol=0, atol=1e-5)


def pixels(work):
    return torch.from_numpy(np.load(work / "task.npz")["pixel_values"])


@pytest.mark.parametrize(("router", "target"), [("full", "onnxruntime-cpu"), ("rows", "rtx-ada")])
def test_each_member_of_a_graph_loses_its_experts_and_the_rest_is_proven(router, target, work, tmp_path):
    out = tmp_path / "optimized"
    done("optimize", work / "exported", "--plan", work / f"{router}.json", "--target", target, "-o", out)
    blocks = json.loads((out / "manifest.json").read_text())["blocks"]
    assert {block["name"]: (block["experts"], tuple(block["keep"])) for block in blocks} == {
        name: (3, keep) for name, keep in GROWN.items()
    }
    printed = done("verify", out, "--reference", work / "exported", "--data", work / "task.npz")
    assert printed.startswith("PASS: 24 examples of task data, float32, 0 flips")


def test_statistics_are_those_of_a_member_and_every_criterion_plans_by_them(work, tmp_path):
    statistics = tmp_path / "statistics.safetensors"
    done("calibrate", work / "tuned", "--data", work / "task.npz", "-o", statistics)
    done("plan", statistics, "--criterion", "reap", "--keep", "50%", "-o", tmp_path / "plan.json")
    layers = PruningPlan.load(tmp_path / "plan.json").layers
    assert {layer.name: len(layer.keep) for layer in layers} == dict.fromkeys(GROWN, EXPERTS // 2)


def test_members_with_different_counts_are_for_onnx_only(work, tmp_path):
    experts = [f"--experts={name}={','.join(map(str, keep))}" for name, keep in GROWN.items()]
    experts[0] = "--experts=layers.0.mlp.members.0=0,1,2,3"
    done("plan", work / "tuned", *experts, "-o", tmp_path / "plan.json")
    assert invoke("prune", work / "tuned", "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned") == (
        1,
        "",
        f"error: the plan leaves different counts in the layers of {work / 'tuned'} (layers.0.mlp.members.0: 4 (K=2), "
        "layers.0.mlp.members.1: 3 (K=2), layers.1.mlp.members.0: 3 (K=2), layers.1.mlp.members.1: 3 (K=2)), but a "
        "checkpoint's config.json has one for all of them\n"
        "hint: prune the ONNX graph, which has no such limit: moe-edge optimize exported/ --plan plan.json\n",
    )
    done("optimize", work / "exported", "--plan", tmp_path / "plan.json", "-o", tmp_path / "optimized")


def test_an_engine_of_an_ensemble_is_built(work, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    done("optimize", work / "exported", "--target", "rtx-ada", "-o", tmp_path / "dense", "--no-prove")
    done("build", tmp_path / "dense", "--target", "rtx-ada", "-o", tmp_path / "engine")
