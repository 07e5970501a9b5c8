"""Experts that are replaced by their mean outputs, from data to a verified graph."""

import dataclasses

import numpy as np
import pytest

import moe_spec.record
from moe_spec.plan import PruningPlan
from moe_spec.statistics import Statistics
from tests.cli.helpers import invoke, leftovers
from tests.models_table import TINY

HIDDEN = TINY["olmoe"]().config.hidden_size


@pytest.fixture(scope="module")
def statistics(zoo, tmp_path_factory):
    directory = tmp_path_factory.mktemp("statistics")
    np.savez(directory / "data.npz", input_ids=np.random.default_rng(0).integers(0, 64, (8, 12)))
    out = directory / "statistics.safetensors"
    assert invoke("calibrate", zoo.checkpoint("olmoe"), "--data", directory / "data.npz", "-o", out)[0] == 0
    return out


def test_mone_from_statistics_to_a_verified_graph(zoo, statistics, tmp_path):
    plan, means, optimized = tmp_path / "plan.json", tmp_path / "plan.means.safetensors", tmp_path / "optimized"
    assert invoke("plan", statistics, "--criterion", "mone", "--keep", "50%", "-o", plan) == (
        0,
        f"{plan}: keeps 8 of 16 experts in 2 layers, by mone\n  {means}: the mean outputs of the others\n",
        "",
    )
    assert leftovers(tmp_path) == {plan.name, means.name}
    assert "keeps 4 of 8, K=2, router replace: [" in invoke("inspect", plan)[1]
    assert invoke("prune", zoo.checkpoint("olmoe"), "--plan", plan, "-o", tmp_path / "pruned") == (
        1,
        "",
        "error: the plan keeps the router of layer model.layers.0.mlp full, but a checkpoint has as many experts as "
        "its router has rows\n"
        "hint: export it, an ONNX graph may have fewer: moe-edge export CHECKPOINT --plan plan.json -o exported/\n",
    )
    assert invoke("optimize", zoo.exported("olmoe"), "--plan", plan, "-o", optimized)[0] == 0
    verify = ("verify", optimized, "--reference", zoo.exported("olmoe"))
    assert invoke(*verify) == (
        1,
        "",
        "error: the plan puts mean outputs in the place of experts of layer model.layers.0.mlp, which are not at hand\n"
        "hint: give the plan.json that names them: --plan plan.json\n",
    )
    assert invoke(*verify, "--plan", plan)[0] == 0


def test_a_graph_with_other_constants_is_found(zoo, statistics, tmp_path):
    plan, optimized = tmp_path / "plan.json", tmp_path / "optimized"
    assert (
        invoke("plan", statistics, "--criterion", "frequency", "--router", "replace", "--keep", 4, "-o", plan)[0] == 0
    )
    assert invoke("optimize", zoo.exported("olmoe"), "--plan", plan, "-o", optimized)[0] == 0
    made = PruningPlan.load(plan)
    layers = (dataclasses.replace(layer, means_DH=layer.mean_outputs(HIDDEN) + 1) for layer in made.layers)
    dataclasses.replace(made, layers=tuple(layers)).save(tmp_path / "other.json")
    other = ("--reference", zoo.exported("olmoe"), "--plan", tmp_path / "other.json")
    assert invoke("verify", optimized, *other)[0] == 3


def test_ctrl_c_leaves_neither_file(statistics, tmp_path, monkeypatch):
    def interrupted(payload):
        raise KeyboardInterrupt

    monkeypatch.setattr(moe_spec.record, "dump", interrupted)
    arguments = ("plan", statistics, "--criterion", "mone", "--keep", 4, "-o", tmp_path / "plan.json")
    assert invoke(*arguments) == (130, "", "interrupted; nothing half-written is left\n")
    assert leftovers(tmp_path) == set()


def test_experts_that_no_token_selected_are_told(statistics, tmp_path):
    seen = Statistics.load(statistics)
    for layer in seen.layers:
        for key in ("tokens", "gate", "output", "output_squared"):
            layer.sums[key][3] = 0
    seen.save(tmp_path / "statistics.safetensors")
    arguments = ("--criterion", "mone", "--keep", 4, "-o", tmp_path / "plan.json")
    _, out, _ = invoke("plan", tmp_path / "statistics.safetensors", *arguments)
    assert out.endswith(": the mean outputs of the others, zeros for 2 that no token selected\n")
    for made in PruningPlan.load(tmp_path / "plan.json").layers:
        assert not made.mean_outputs(HIDDEN)[made.dropped.index(3)].any()
