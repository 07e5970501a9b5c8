"""The checkpoint itself as the reference: torch runs it, and its routers are seen."""

import json
import re

import pytest

from benchmarks.planted import FAULTS, plant
from moe_spec.manifest import Manifest
from moe_spec.plan import LayerPlan, PruningPlan
from tests.cli.helpers import invoke


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


def test_a_router_that_differs_from_the_checkpoints_is_caught(zoo, tmp_path):
    broken = plant(zoo.exported("mixtral"), tmp_path / "broken", FAULTS["one router row of another expert"], 1)
    code, out, err = invoke("verify", broken, "--reference", zoo.checkpoint("mixtral"))
    assert code == 3
    assert "  note: to find the part at fault, export the checkpoint and give that as --reference\n" in out
    assert "the first layer that went wrong is model.layers.1.mlp" in err
    assert re.search(r"select other experts although the reference's choice was clear", err)
