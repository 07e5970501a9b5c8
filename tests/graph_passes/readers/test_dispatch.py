"""Experts with places for so many tokens: Switch, GShard and V-MoE as two exporters write them."""

import numpy as np
import onnx
import pytest

from graph_passes.describe import inspect_model, read_model
from graph_passes.optimize import optimize
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from tests.foreign.table import FOREIGN
from tests.graph_passes.block_models import save, spec_of
from tests.zoo import RUNNER

GRAPHS = [name for name, entry in FOREIGN.items() if entry.form == "dispatch"]


@pytest.mark.parametrize("name", GRAPHS)
def test_real_exports_are_read(zoo, name):
    entry, model = FOREIGN[name], inspect_model(zoo.foreign(name))
    assert model.unrecognised == ()
    assert [block.form for block in model.blocks] == ["dispatch"] * entry.layers
    for block in model.blocks:
        router = block.router
        assert router.capacity is not None
        assert (block.num_experts, router.top_k) == (8, entry.top_k)
        assert router.capacity.by_slot == (entry.top_k > 1)
        assert (router.capacity.sequence is not None) == ("vmoe" in name)
        assert router.capacity.before_renormalisation == ("gshard" in name)


@pytest.mark.parametrize("keep", [(0, 3, 5), (2,)], ids=["3 of 8", "1 of 8"])
@pytest.mark.parametrize("name", GRAPHS)
def test_real_exports_are_pruned_exactly(zoo, tmp_path, name, keep):
    source = zoo.foreign(name)
    model = read_model(source)
    top_k = min(FOREIGN[name].top_k, len(keep))
    layers = tuple(LayerPlan(block.name, 8, top_k, keep) for block in model.blocks)
    plan = PruningPlan(model.source_sha256, "by hand", layers)
    for form in ("dense", "sorted", "gather"):
        manifest = optimize(source, tmp_path / form, RUNNER, plan=plan, form=form)
        assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
        assert all(entry["agreeing"] == entry["tokens"] for entry in manifest.details["choices"])
        assert [block.router.kind for block in read_model(tmp_path / form).blocks] == [
            block.router.kind for block in model.blocks
        ]


def test_a_capacity_drops_tokens_after_pruning_too(zoo, tmp_path):
    """More tokens want each expert that is left, and no more of them find a place."""
    source = zoo.foreign("dispatch_switch")
    model = read_model(source)
    (block,) = model.blocks
    plan = PruningPlan(model.source_sha256, "by hand", (LayerPlan(block.name, 8, 1, (0, 3)),))
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan, form="dense")
    x = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    name = manifest.blocks[0].gates
    assert name is not None
    gates = RUNNER.run(tmp_path / "out" / "observed.onnx", [{"x": x}])[0][name]
    assert ((gates != 0).sum(axis=0) == 4).all()


@pytest.mark.parametrize(
    ("equation", "changed", "reason"),
    [
        ("gsec,gsh->egch", "gsec,gsh->gech", "tokens and places do not stand where a dispatch has them"),
        ("gsec,egch->gsh", "gsec,gech->gsh", "tokens and places do not stand where a dispatch has them"),
    ],
)
def test_axes_elsewhere_are_refused(tmp_path, equation, changed, reason):
    path = tmp_path / "block.onnx"
    save(spec_of("dispatch", "vmoe", einsum=True), path)
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.s == equation.encode():
                attribute.s = changed.encode()
    onnx.save(model, path)
    (layer,) = inspect_model(path).unrecognised
    refusal = next(refusal for refusal in layer.refusals if refusal.form == "dispatch")
    assert (refusal.reason, refusal.node) == (reason, "Einsum 'einsum_3'")


def test_tokens_that_go_elsewhere_than_they_come_from_are_refused(tmp_path):
    path = tmp_path / "block.onnx"
    save(spec_of("dispatch", "vmoe"), path)
    model = onnx.load(path)
    dispatch = next(node for node in model.graph.node if node.op_type == "Einsum")
    dispatch.input[0] = next(node for node in model.graph.node if node.op_type == "Softmax").output[0]
    onnx.save(model, path)
    (layer,) = inspect_model(path).unrecognised
    refusal = next(refusal for refusal in layer.refusals if refusal.form == "dispatch")
    assert refusal.reason == "tokens are dispatched into other places than they are combined from"
