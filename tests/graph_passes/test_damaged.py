"""Damaged graphs: always a clear error, never a traceback or a written output."""

import random

import onnx
import pytest
from onnx import TensorProto

from graph_passes.describe import inspect_model, read_model
from graph_passes.optimize import optimize
from moe_spec.errors import UserError, VerificationError
from moe_spec.feasibility import Groups
from tests.graph_passes.block_models import NAME, Spec, save
from tests.zoo import RUNNER

SPECS = (
    Spec(biased=True, router_bias=True),
    Spec(score="sigmoid", selection_bias=True, renormalize=True, groups=Groups(2, 1), scale=2.5),
    Spec(topk_first=True, interleaved=True, transposed=True),
)


def drop_input(model, rng):
    node = rng.choice(model.graph.node)
    if node.input:
        del node.input[rng.randrange(len(node.input))]


def swap_inputs(model, rng):
    one, other = rng.choice(model.graph.node), rng.choice(model.graph.node)
    if one.input and other.input:
        here, there = rng.randrange(len(one.input)), rng.randrange(len(other.input))
        one.input[here], other.input[there] = other.input[there], one.input[here]


def drop_node(model, rng):
    del model.graph.node[rng.randrange(len(model.graph.node))]


def drop_attribute(model, rng):
    node = rng.choice([node for node in model.graph.node if node.attribute])
    del node.attribute[rng.randrange(len(node.attribute))]


def drop_initializer(model, rng):
    del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def change_shape(model, rng):
    tensor = rng.choice([tensor for tensor in model.graph.initializer if tensor.dims])
    axis = rng.randrange(len(tensor.dims))
    tensor.dims[axis] = rng.choice([0, 1, tensor.dims[axis] + 1, 1 << 40])


def transpose_shape(model, rng):
    tensor = rng.choice([tensor for tensor in model.graph.initializer if len(tensor.dims) > 1])
    tensor.dims[:] = list(reversed(tensor.dims))


def change_type(model, rng):
    rng.choice(model.graph.initializer).data_type = rng.choice([TensorProto.INT64, TensorProto.FLOAT16, 99])


def duplicate_name(model, rng):
    model.graph.initializer[0].name = rng.choice(model.graph.initializer).name


def make_cycle(model, rng):
    model.graph.node[0].input[0] = rng.choice(model.graph.node[-1].output)


DAMAGE = (
    drop_input,
    swap_inputs,
    drop_node,
    drop_attribute,
    drop_initializer,
    change_shape,
    transpose_shape,
    change_type,
    duplicate_name,
    make_cycle,
)


@pytest.mark.parametrize("damage", DAMAGE, ids=[damage.__name__ for damage in DAMAGE])
@pytest.mark.parametrize("spec", SPECS, ids=["softmax", "groups", "top-k first"])
def test_damage_ends_in_an_error_or_in_a_proven_graph(tmp_path, damage, spec):
    path, out = tmp_path / "block.onnx", tmp_path / "out"
    for seed in range(12):
        save(spec, path)
        model = onnx.load(path)
        damage(model, random.Random(seed))
        onnx.save(model, path)
        try:
            optimize(path, tmp_path / f"proven-{seed}", RUNNER)
        except (UserError, VerificationError):
            assert not out.exists()
    leftovers = [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    assert leftovers == []


def test_an_export_that_lost_experts_is_detected(tmp_path):
    """The router has 8 rows, the graph holds 5 experts (tracing can lose those that no example token chose)."""
    path = tmp_path / "block.onnx"
    save(Spec(experts=5), path)
    lost = onnx.load(path)
    save(Spec(experts=8), path)
    whole = onnx.load(path)
    kept = {tensor.name: tensor for tensor in lost.graph.initializer if ".experts." in tensor.name}
    for tensor in whole.graph.initializer:
        if tensor.name in kept:
            tensor.CopyFrom(kept[tensor.name])
    onnx.save(whole, path)
    assert [layer.refusals[0].reason for layer in inspect_model(path).unrecognised] == [
        "the router chooses among 8 experts that read 8 channels, there are 5 that read 8"
    ]


def test_a_computed_weight_is_refused(tmp_path):
    path = tmp_path / "block.onnx"
    save(Spec(), path)
    model = onnx.load(path)
    model.graph.node.insert(0, onnx.helper.make_node("Identity", [f"{NAME}.experts.up"], ["computed"]))
    model.graph.node[-1].input[3] = "computed"
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"experts: a weight is no constant \(at Identity 'computed'\)"):
        read_model(path)
