"""Merging from the first command to the last: calibrate, plan, prune, export."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from models.checkpoints import save_model
from models.moe_layers import find_moe_layers
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from pruning.merging.mergers import MERGERS
from tests.cli.helpers import invoke
from tests.models_table import TINY, example_inputs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "vmoe"
    save_model(TINY["vmoe"](), directory)
    return directory


@pytest.fixture(scope="module")
def statistics(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("statistics")
    images = example_inputs(TINY["vmoe"](), batch=16, sequence=0, seed=0)["pixel_values"]
    np.savez(directory / "data.npz", pixel_values=images.numpy())
    out = directory / "statistics.safetensors"
    assert invoke("calibrate", checkpoint, "--data", directory / "data.npz", "--dense", "-o", out)[0] == 0
    return out


@pytest.mark.parametrize("name", MERGERS)
def test_a_merge_is_planned_said_and_carried_out(name, checkpoint, statistics, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "merged"
    code, stdout, stderr = invoke("plan", statistics, "--criterion", name, "--keep", 4, "-o", plan)
    notes = "".join(f"  note: {note}\n" for note in MERGERS[name].notes(MERGERS[name].router))
    assert (code, stdout, stderr) == (0, f"{plan}: merges 16 experts in 2 layers into 8, by {name}\n{notes}", "")
    made = PruningPlan.load(plan)
    for layer in made.layers:
        assert {expert for merge in layer.merge for expert in merge.experts} == set(range(8))
        assert (layer.router, layer.align) == (MERGERS[name].router, MERGERS[name].align)
    assert made.options["router"] == MERGERS[name].router
    assert invoke("prune", checkpoint, "--plan", plan, "-o", out)[0] == 0
    merged = AutoModelForImageClassification.from_pretrained(out, local_files_only=True)
    assert [layer.num_experts for layer in find_moe_layers(merged)] == [4, 4]
    with torch.no_grad():
        assert merged(**example_inputs(merged, batch=2, sequence=0, seed=1)).logits.isfinite().all()


def test_the_router_is_the_users_choice(statistics, tmp_path):
    plan = tmp_path / "plan.json"
    arguments = ("plan", statistics, "--criterion", "uncurl", "--router", "mean", "--keep", 4, "-o", plan)
    code, stdout, _ = invoke(*arguments, "--json")
    assert code == 0
    assert {layer["router"] for layer in json.loads(stdout)["layers"]} == {"mean"}
    arguments = (
        "plan",
        statistics,
        "--criterion",
        "uncurl",
        "--router",
        "full",
        "--keep",
        4,
        "-o",
        tmp_path / "no.json",
    )
    code, _, stderr = invoke(*arguments)
    assert (code, stderr) == (
        1,
        "error: 'full' is no router of a plan that merges experts\nhint: known: alias, mean, new, rows\n",
    )


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "exported"
    assert invoke("export", checkpoint, "-o", directory)[0] == 0
    return directory


def test_a_merge_is_exported_at_once_or_carried_out_in_the_graph(checkpoint, whole, statistics, tmp_path):
    plan, exported, optimized = (tmp_path / name for name in ("plan.json", "exported", "optimized"))
    assert invoke("plan", statistics, "--criterion", "m-smoe", "--keep", 2, "-o", plan)[0] == 0
    assert invoke("export", checkpoint, "--plan", plan, "-o", exported)[0] == 0
    assert invoke("optimize", whole, "--plan", plan, "-o", optimized)[0] == 0
    for manifest in (Manifest.load(exported), Manifest.load(optimized)):
        assert [block.experts for block in manifest.blocks] == [2, 2]
        assert manifest.plan == PruningPlan.load(plan)
    assert invoke("verify", optimized, "--reference", exported)[0] == 0
    assert invoke("verify", optimized, "--reference", whole)[0] == 0


@pytest.mark.parametrize("form", ["dense", "sorted", "gather"])
def test_rows_share_experts_from_the_plan_to_the_graph(form, whole, statistics, tmp_path):
    plan, optimized = tmp_path / "plan.json", tmp_path / "optimized"
    arguments = ("--criterion", "m-smoe", "--router", "alias", "--keep", 3, "-o", plan)
    assert invoke("plan", statistics, *arguments)[0] == 0
    assert invoke("optimize", whole, "--plan", plan, "--form", form, "-o", optimized)[0] == 0
    blocks = Manifest.load(optimized).blocks
    assert [(block.experts, block.form) for block in blocks] == [(3, form)] * 2
    assert all(block.router.endswith("8 of 8 rows lead to one of 3 experts") for block in blocks)
    assert sum(block.bytes for block in blocks) < sum(block.bytes for block in Manifest.load(whole).blocks) / 2
    assert invoke("verify", optimized, "--reference", whole)[0] == 0


def test_k_stays_where_rows_share_experts(statistics, tmp_path):
    arguments = (
        "--criterion",
        "m-smoe",
        "--router",
        "alias",
        "--keep",
        1,
        "--clamp-top-k",
        "-o",
        tmp_path / "plan.json",
    )
    assert invoke("plan", statistics, *arguments) == (
        1,
        "",
        "error: --clamp-top-k lets K shrink, but --router alias leaves it as it is\n"
        "hint: leave out one of the two: with --router alias fewer than K experts may be kept as it is\n",
    )
    assert invoke("plan", statistics, *arguments[:-3], "-o", tmp_path / "plan.json")[0] == 0
    assert [(len(layer.keep), layer.top_k) for layer in PruningPlan.load(tmp_path / "plan.json").layers] == [(1, 2)] * 2
