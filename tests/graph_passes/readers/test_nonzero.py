"""Experts that pick their tokens with NonZero: every spelling is read, every near miss is refused."""

import numpy as np
import onnx
import pytest

from graph_passes.model_file import load_graph
from graph_passes.readers import nonzero
from graph_passes.record.block import ON_INPUT
from moe_spec.experts_op import Activation
from moe_spec.feasibility import Groups
from tests.foreign.table import FOREIGN
from tests.graph_passes.block_models import ROUTERS, Spec, weights
from tests.graph_passes.readers.proofs import (
    ALL,
    CLAMPED,
    ONE,
    THREE,
    assert_fixed_shapes_are_pruned,
    assert_pruned_exactly,
    assert_weights_are_original,
    blocks_of,
    edited,
    let_read,
    node_of,
    said,
    saved,
)

SMALL = Spec(form="nonzero", experts=3, hit="equal", scatter="ScatterND")

SPELLINGS = [
    {},
    {"separate": True, "linear": "matmul"},
    {"biased": True, "interleaved": True, "activation": CLAMPED},
    {"gated": False, "activation": Activation("gelu_tanh"), "opset": 18},
    {"unoptimised": True},
    {"sliced": True},
    {"named": False, "constants_as_nodes": True, "opset": 17},
    {"experts": 1, "top_k": 1},
    {"top_k": 1},
    {"top_k": 8},
]


@pytest.mark.parametrize(
    ("hit", "scatter"),
    [("one_hot", "index_put"), ("equal", "ScatterND"), ("equal", "assign"), ("gates", "ScatterElements")],
)
@pytest.mark.parametrize("fields", SPELLINGS, ids=lambda fields: "-".join(fields) or "plain")
def test_every_spelling_gives_the_same_record(tmp_path, hit, scatter, fields):
    spec = Spec(form="nonzero", scatter=scatter, hit=hit, **fields)
    (block,) = blocks_of(saved(spec, tmp_path), "nonzero")
    assert_weights_are_original(spec, block)
    assert (block.num_experts, block.router.top_k) == (spec.experts, spec.top_k)
    assert block.experts.activation == spec.activation


@pytest.mark.parametrize("keeps", [(THREE, THREE), (ONE, ONE), (THREE, ALL)], ids=["3 of 8", "1 of 8", "uneven"])
@pytest.mark.parametrize(
    "fields",
    [
        {"hit": "one_hot", "scatter": "index_put", "renormalize": True},
        {"hit": "equal", "scatter": "assign", "score": "sigmoid", "selection_bias": True, "groups": Groups(4, 2)},
        {"hit": "gates", "scatter": "ScatterElements", "topk_first": True, "router_bias": True},
        {"hit": "one_hot", "scatter": "assign", "dtype": "float16", "weights_float": True},
        {**ROUTERS["llama4"], "hit": "equal", "scatter": "ScatterElements"},
    ],
    ids=["mixtral", "deepseek", "gates", "half", "llama4"],
)
def test_pruned_experts_are_gone_and_the_others_compute_what_they_did(tmp_path, fields, keeps):
    if len(keeps[0]) == 1 and "groups" in fields:
        pytest.skip("one expert leaves no two groups to choose")
    assert_pruned_exactly(Spec(form="nonzero", layers=2, **fields), tmp_path, *keeps)


@pytest.mark.parametrize("name", [name for name in FOREIGN if name.startswith("nonzero_")])
def test_what_real_exporters_write_is_read(zoo, name):
    entry = FOREIGN[name]
    blocks = blocks_of(zoo.foreign(name), "nonzero")
    assert len(blocks) == entry.layers
    state = entry.make().state_dict()
    for layer, block in enumerate(blocks):
        found = {tuple(weight.load()[5].ravel()[:9].tolist()) for weight in block.experts.weights()}
        stored = {key: value for key, value in state.items() if f"moes.{layer}.experts.5." in key}
        assert found == {tuple(value.t().reshape(-1)[:9].tolist()) for value in stored.values()}


def test_llama4_weighs_what_experts_read(tmp_path):
    (block,) = blocks_of(saved(Spec(form="nonzero", **{**ROUTERS["llama4"], "hit": "equal"}), tmp_path), "nonzero")
    assert block.weights_on == ON_INPUT


@pytest.mark.parametrize("name", ["nonzero_mixtral_torchscript", "nonzero_deepseek"])
def test_an_export_of_fixed_shapes_is_read_and_pruned(tmp_path, name):
    assert_fixed_shapes_are_pruned(name, tmp_path)


def test_gates_may_be_compared_with_zero(tmp_path):
    def compare(graph):
        graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), "nothing"))
        for number, found in enumerate([node for node in graph.node if node.op_type == "NonZero"]):
            mask = node_of(graph, found.input[0])
            equal = onnx.helper.make_node("Equal", [mask.input[0], "nothing"], [f"is_nothing_{number}"])
            mask.CopyFrom(onnx.helper.make_node("Not", [f"is_nothing_{number}"], list(mask.output)))
            graph.node.insert(list(graph.node).index(mask), equal)

    spec = Spec(form="nonzero", hit="gates", scatter="ScatterND")
    (block,) = blocks_of(edited(spec, tmp_path, compare), "nonzero")
    assert_weights_are_original(spec, block)


def test_which_expert_a_branch_is_follows_from_the_id_not_from_the_order(tmp_path):
    def swap(graph):
        first, last = (node_of(graph, name) for name in ("eq", "eq_2"))
        first.input[1], last.input[1] = last.input[1], first.input[1]

    (block,) = blocks_of(edited(SMALL, tmp_path, swap), "nonzero")
    down = weights(SMALL)["down"].swapaxes(1, 2)
    np.testing.assert_array_equal(block.experts.down_EFH.load(), down[[2, 1, 0]])


def test_experts_that_an_exporter_lost_are_named(tmp_path, zoo):
    def compute_the_second_twice(graph):
        let_read(graph, "eq_2", 1, np.asarray(1))

    assert said(edited(SMALL, tmp_path, compute_the_second_twice), "nonzero") == [
        "nonzero: the router chooses among 3 experts, the graph computes experts [0, 1] only: "
        "the exporter lost expert 2 (at ScatterND 'out')"
    ]
    assert said(zoo.foreign("lost_mixtral"), "nonzero") == [
        "nonzero: 7 branches compute whichever of 8 experts are hit: the exporter kept as many as its example hit "
        "(at Gather '/experts/Gather_59')"
    ]


NEAR_MISSES = {
    "overwrites": (
        lambda graph: node_of(graph, "scatternd_1").attribute.pop(),
        "the experts' outputs are not added up token by token (at ScatterND 'out')",
    ),
    "adds to the residual": (
        lambda graph: let_read(graph, "scatternd", 0, "x"),
        "the experts' outputs are not added up token by token (at ScatterND 'out')",
    ),
    "adds to a shared expert": (
        lambda graph: let_read(graph, "scatternd", 0, "logits"),
        "Gemm is no op that picks, sorts or returns tokens (at Gemm 'logits')",
    ),
    "other tokens": (
        lambda graph: let_read(graph, "gather_6", 1, "gather_2"),
        "an expert does not read the tokens that it is weighed for (at Gemm 'linear')",
    ),
    "weights of another expert": (
        lambda graph: let_read(graph, "unsqueeze_6", 0, "index_1"),
        "an expert does not read the tokens that it is weighed for (at Gemm 'linear')",
    ),
    "returned elsewhere": (
        lambda graph: let_read(graph, "scatternd", 1, "unsqueeze_2"),
        "the experts' outputs are not added up token by token (at ScatterND 'out')",
    ),
    "no weights": (
        lambda graph: let_read(graph, "mul_1", 1, np.float32(0.5).reshape(1)),
        "an expert's output is not multiplied with gathered weights (at Mul 'mul_1')",
    ),
    "another activation": (
        lambda graph: setattr(node_of(graph, "sigmoid"), "op_type", "Tanh"),
        "Mul ends no known activation (at Mul 'mul')",
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_is_refused_with_the_node(tmp_path, miss):
    change, reason = NEAR_MISSES[miss]
    assert said(edited(SMALL, tmp_path, change), "nonzero") == [f"nonzero: {reason}"]


def test_ops_that_are_nested_without_end_are_refused(tmp_path):
    def turn_the_weight_many_times(graph):
        name = node_of(graph, "linear_1").input[1]
        for turn in range(4000):
            node = onnx.helper.make_node("Transpose", [name], [f"turned_{turn}"], perm=[1, 0])
            graph.node.insert(turn, node)
            name = f"turned_{turn}"
        let_read(graph, "linear_1", 1, name)

    assert said(edited(SMALL, tmp_path, turn_the_weight_many_times), "nonzero") == [
        "nonzero: its ops are nested deeper than any exporter nests them (at ScatterND 'out')"
    ]


def test_nonzero_elsewhere_is_no_moe(tmp_path):
    path = saved(Spec(form="experts"), tmp_path)
    assert nonzero.anchors(load_graph(path)) == []
