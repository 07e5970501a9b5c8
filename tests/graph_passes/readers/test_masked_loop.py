"""One branch an expert: its column of the gates proves which, lost experts are named, other sums are left alone."""

import numpy as np
import onnx
import pytest

from graph_passes.describe import inspect_model, read_model
from graph_passes.optimize import optimize
from graph_passes.record.block import ON_INPUT, ON_OUTPUT
from moe_spec.errors import UserError
from tests.foreign.table import FOREIGN
from tests.graph_passes.block_models import ROUTERS, Spec
from tests.graph_passes.readers.proofs import (
    ALL,
    CLAMPED,
    ONE,
    THREE,
    assert_pruned_exactly,
    assert_weights_are_original,
    blocks_of,
    edited,
    in_turn,
    let_read,
    node_of,
    said,
    saved,
)
from tests.zoo import RUNNER

LLAMA4 = {**ROUTERS["llama4"], "tiled": False}

WAYS = {
    "slices, added": Spec(form="masked_loop"),
    "gathered columns, one sum": Spec(form="masked_loop", column="gather", total="sum", biased=True),
    "split columns, stacked": Spec(form="masked_loop", column="split", total="stack", gated=False),
    "unoptimised, interleaved": Spec(
        form="masked_loop", unoptimised=True, biased=True, interleaved=True, activation=CLAMPED
    ),
    "out of stacked weights": Spec(form="masked_loop", sliced=True, linear="matmul", transposed=True),
    "half, weighed in float": Spec(form="masked_loop", dtype="float16", weights_float=True),
    "gates on the input": Spec(form="masked_loop", **LLAMA4),
    "one expert": Spec(form="masked_loop", experts=1, top_k=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_record_holds_the_models_weights(tmp_path, way):
    spec = WAYS[way]
    (block,) = blocks_of(saved(spec, tmp_path), "masked_loop")
    assert_weights_are_original(spec, block)
    assert (block.name, block.hidden.name, block.out.name) == ("layers.0.mlp", "x", "out")
    assert block.weights_on == (ON_INPUT if spec.weights_on == "input" else ON_OUTPUT)


@pytest.mark.parametrize("way", ["slices, added", "split columns, stacked", "gates on the input"])
@pytest.mark.parametrize("keeps", [(THREE, ONE), (ALL, THREE)], ids=str)
def test_layers_are_pruned_exactly(tmp_path, way, keeps):
    manifest = assert_pruned_exactly(Spec(**{**vars(WAYS[way]), "layers": 2}), tmp_path, *keeps)
    assert [entry.keep for entry in manifest.blocks] == list(keeps)


def _swap_columns(graph: onnx.GraphProto) -> None:
    """Branch 0 gets the gate of expert 2 and the other way round: their weights change places in the record."""
    first, third = node_of(graph, "mul_1"), node_of(graph, "mul_5")
    first.input[0], third.input[0] = third.input[0], first.input[0]


def test_the_column_says_which_expert_a_branch_is_not_its_place(tmp_path):
    spec = Spec(form="masked_loop", experts=3)
    (straight,) = blocks_of(saved(spec, tmp_path), "masked_loop")
    before = straight.experts.down_EFH.load()
    (swapped,) = blocks_of(edited(spec, tmp_path, _swap_columns), "masked_loop")
    np.testing.assert_array_equal(swapped.experts.down_EFH.load(), before[[2, 1, 0]])


def _parameters(module, name: str) -> np.ndarray:
    return np.stack([expert.get_parameter(name).detach().numpy().T for expert in module.experts])


READABLE = [
    name for name in FOREIGN if name.startswith("masked_loop") and "images" not in name and "switch" not in name
]


@pytest.mark.parametrize("name", READABLE)
def test_a_real_export_is_read_with_the_weights_of_its_model(zoo, name):
    modules = [module for module in FOREIGN[name].make().modules() if hasattr(module, "experts")]
    blocks = blocks_of(zoo.foreign(name), "masked_loop")
    assert len(blocks) == len(modules) == FOREIGN[name].layers
    for block, module in zip(blocks, modules, strict=True):
        experts = block.experts
        found = [weight for weight in (experts.gate_EHF, experts.up_EHF, experts.down_EFH) if weight is not None]
        names = ("fc1.weight", "fc2.weight") if len(found) == 2 else ("w1.weight", "w3.weight", "w2.weight")
        for parameter, weight in zip(names, found, strict=True):
            np.testing.assert_array_equal(weight.load(), _parameters(module, parameter))


def test_lost_experts_are_named(zoo, tmp_path):
    path = zoo.foreign("lost_unique")
    (first, *_) = said(path, "masked_loop")
    assert first.startswith("masked_loop: the router chooses among 8 experts, the graph computes experts [")
    with pytest.raises(UserError, match="only: the exporter lost experts"):
        read_model(path)


SEQUENCES = """
    zero = Constant<value_ints = [0]>()
    one = Constant<value_ints = [1]>()
    two = Constant<value_ints = [2]>()
    router = Constant<value = float[4, 2] {0,1,2,3,4,5,6,7}>()
    w = Constant<value = float[4, 4] {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}>()
    logits = MatMul(x, router)
    gates = Softmax<axis = -1>(logits)
    first = Slice(gates, zero, one, two)
    second = Slice(gates, one, two, two)
    up = MatMul(x, w)
    middle = Relu(up)
    down = MatMul(middle, w)
    left = Mul(first, down)
    right = Mul(second, down)
    out = Add(left, right)
"""


def test_tokens_in_two_axes_are_refused(tmp_path):
    text = f'<ir_version: 10, opset_import: ["" : 20]> m (float[b, s, 4] x) => (float[b, s, 4] out) {{ {SEQUENCES} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert said(tmp_path / "model.onnx", "masked_loop") == [
        "masked_loop: the gates have their experts on axis 2, expected (tokens, experts) (at Add 'out')"
    ]


def test_convolutions_are_refused_by_node(zoo):
    refusals = said(zoo.foreign("masked_loop_images"), "masked_loop")
    assert refusals
    assert all(refusal.startswith("masked_loop: a projection is no Gemm or MatMul (at Conv ") for refusal in refusals)


TINY = Spec(form="masked_loop", experts=3, named=False)
STACK = Spec(form="masked_loop", experts=3, total="stack")


def _drop_branch(graph: onnx.GraphProto) -> None:
    let_read(graph, "add_1", 1, "zeros_like_1")


def _cut_column_7(graph: onnx.GraphProto) -> None:
    let_read(graph, "slice_1", 1, np.asarray([7]))
    graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([8]), "eight"))
    let_read(graph, "slice_1", 2, "eight")


def _become(output: str, op: str):
    def change(graph: onnx.GraphProto) -> None:
        node = node_of(graph, output)
        node.op_type = op
        del node.attribute[:]

    return change


NEAR_MISSES = {
    "an expert is lost": (
        TINY,
        _drop_branch,
        "the router chooses among 3 experts, the graph computes experts [0, 2] only: the exporter lost experts [1] "
        "(at Add 'out')",
    ),
    "an expert stands for two": (
        TINY,
        lambda graph: let_read(graph, "mul_3", 0, "slice"),
        "expert 0 has two branches (at Gemm 'linear_3')",
    ),
    "an expert of another column": (
        TINY,
        _cut_column_7,
        "the router chooses among 3 experts, the graph computes experts [0, 2, 7] only: the exporter lost experts [1] "
        "(at Add 'out')",
    ),
    "a branch of other tokens": (
        TINY,
        in_turn(
            lambda graph: graph.node.insert(0, onnx.helper.make_node("Neg", ["x"], ["other"])),
            lambda graph: let_read(graph, "linear_2", 0, "other"),
        ),
        "the branches read different values (at Gemm 'linear_2')",
    ),
    "experts of two kinds": (
        TINY,
        in_turn(
            lambda graph: graph.node.insert(15, onnx.helper.make_node("Relu", ["split_2"], ["relu"])),
            lambda graph: let_read(graph, "mul_2", 0, "relu"),
        ),
        "experts have different activations (at Gemm 'linear_3')",
    ),
    "columns of two routers": (
        TINY,
        lambda graph: let_read(graph, "slice_1", 0, "scores"),
        "the branches take their gates from different routers (at Add 'out')",
    ),
    "gates that no router gives": (
        TINY,
        _become("scores", "Tanh"),
        "the scores are no softmax, sigmoid or root of a softplus of logits (at Tanh 'scores')",
    ),
    "stacked along an axis of their own channels": (
        STACK,
        lambda graph: let_read(graph, "unsqueeze_1", 1, np.asarray([0])),
        "the experts' outputs are not put side by side along an axis of their own (at Concat 'stack')",
    ),
    "stacked and summed over tokens": (
        STACK,
        lambda graph: let_read(graph, "out", 1, np.asarray([0])),
        "ReduceSum sums the axes (T, E, H) over another than E (at ReduceSum 'out')",
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_is_refused_with_the_node(tmp_path, miss):
    spec, change, reason = NEAR_MISSES[miss]
    assert said(edited(spec, tmp_path, change), "masked_loop") == [f"masked_loop: {reason}"]


def save_text(path, body: str) -> None:
    text = f'<ir_version: 10, opset_import: ["" : 20]> model (float[n, 4] x) => (float[n, 4] out) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), path)


ORDINARY = {
    "corners of boxes": """
        zero = Constant<value_ints = [0]>()
        one = Constant<value_ints = [1]>()
        two = Constant<value_ints = [2]>()
        left = Slice(x, zero, one, one)
        top = Slice(x, one, two, one)
        wide = Mul(left, x)
        high = Mul(top, x)
        out = Add(wide, high)""",
    "gated projections side by side": """
        zero = Constant<value_ints = [0]>()
        one = Constant<value_ints = [1]>()
        two = Constant<value_ints = [2]>()
        w = Constant<value = float[4, 2] {0,1,2,3,4,5,6,7}>()
        plain = MatMul(x, w)
        shares = Softmax(x)
        left = Slice(shares, zero, one, one)
        top = Slice(shares, one, two, one)
        wide = Mul(left, plain)
        high = Mul(top, plain)
        out = Concat<axis = 1>(wide, high)""",
    "a gated projection beside a plain one": """
        w = Constant<value = float[4, 4] {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}>()
        gate = Sigmoid(x)
        plain = MatMul(x, w)
        gated = Mul(gate, plain)
        out = Add(gated, plain)""",
    "projections side by side": """
        w = Constant<value = float[4, 2] {0,1,2,3,4,5,6,7}>()
        one = MatMul(x, w)
        two = MatMul(x, w)
        out = Concat<axis = 1>(one, two)""",
}


@pytest.mark.parametrize("case", ORDINARY)
def test_ordinary_sums_are_left_alone(tmp_path, case):
    save_text(tmp_path / "model.onnx", ORDINARY[case])
    assert inspect_model(tmp_path / "model.onnx").unrecognised == ()


def test_a_loop_of_many_experts_is_pruned_without_a_walk_for_each(tmp_path):
    """128 branches in a chain: no recursion, every expert once."""
    source = saved(Spec(form="masked_loop", experts=128, hidden=2, width=1), tmp_path)
    manifest = optimize(source, tmp_path / "out", RUNNER)
    assert [(entry.experts, entry.form) for entry in manifest.blocks] == [(128, "masked_loop")]
