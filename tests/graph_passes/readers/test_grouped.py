"""Experts as transformers' own exporter unrolls them: every spelling is read, every near miss is refused."""

import numpy as np
import pytest

from graph_passes.model_file import load_graph
from graph_passes.readers import grouped
from moe_spec.experts_op import Activation
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

SMALL = Spec(form="grouped", experts=3, biased=True)

SPELLINGS = [
    {},
    {"separate": True},
    {"biased": True, "interleaved": True, "transposed": True, "activation": CLAMPED},
    {"gated": False, "activation": Activation("relu2")},
    {"gated": False, "activation": Activation("gelu"), "opset": 18, "biased": True},
    {"unoptimised": True},
    {"rank": 3},
    {"in_function": True},
    {"named": False, "constants_as_nodes": True, "opset": 17},
    {"experts": 1, "top_k": 1},
    {"top_k": 1},
    {"top_k": 8},
    {"experts": 40, "top_k": 6},
]


@pytest.mark.parametrize("fields", SPELLINGS, ids=lambda fields: "-".join(fields) or "plain")
def test_every_spelling_gives_the_same_record(tmp_path, fields):
    spec = Spec(form="grouped", **fields)
    (block,) = blocks_of(saved(spec, tmp_path), "grouped")
    assert_weights_are_original(spec, block)
    assert (block.num_experts, block.router.top_k) == (spec.experts, spec.top_k)
    assert block.experts.activation == spec.activation


@pytest.mark.parametrize("keeps", [(THREE, THREE), (ONE, ONE), (THREE, ALL)], ids=["3 of 8", "1 of 8", "uneven"])
@pytest.mark.parametrize(
    "fields",
    [
        {"renormalize": True},
        {"topk_first": True, "router_bias": True, "biased": True, "interleaved": True, "activation": CLAMPED},
        ROUTERS["sparsemixer"],
    ],
    ids=["mixtral", "gpt_oss", "phimoe"],
)
def test_pruned_experts_are_gone_and_the_others_compute_what_they_did(tmp_path, fields, keeps):
    assert_pruned_exactly(Spec(form="grouped", layers=2, **fields), tmp_path, *keeps)


@pytest.mark.parametrize("keep", [THREE, ONE], ids=["3 of 8", "1 of 8"])
def test_half_precision_is_pruned_with_its_weights_in_float32_or_not(tmp_path, keep):
    for weights_float in (False, True):
        folder = tmp_path / str(weights_float)
        folder.mkdir()
        assert_pruned_exactly(Spec(form="grouped", dtype="float16", weights_float=weights_float), folder, keep)


@pytest.mark.parametrize("name", [name for name in FOREIGN if name.startswith("grouped_")])
def test_what_transformers_exports_is_read(zoo, name):
    entry = FOREIGN[name]
    blocks = blocks_of(zoo.foreign(name), "grouped")
    assert len(blocks) == entry.layers
    down = [value for key, value in entry.make().state_dict().items() if key.endswith("experts.down_proj")]
    for block, stored_EHF in zip(blocks, down, strict=True):
        expected = stored_EHF if name == "grouped_gpt_oss" else stored_EHF.transpose(1, 2)  # it stores (E, F, H)
        np.testing.assert_array_equal(block.experts.down_EFH.load(), expected)


@pytest.mark.parametrize("name", ["grouped_olmoe"])
def test_an_export_of_fixed_shapes_is_read_and_pruned(tmp_path, name):
    assert_fixed_shapes_are_pruned(name, tmp_path)


def test_which_expert_a_branch_is_follows_from_the_run_not_from_the_order(tmp_path):
    def swap(graph):
        for projection in (("matmul", "matmul_2"), ("matmul_3", "matmul_5")):
            first, last = (node_of(graph, name) for name in projection)
            first.input[1], last.input[1] = last.input[1], first.input[1]

    (block,) = blocks_of(edited(SMALL, tmp_path, swap), "grouped")
    down = weights(SMALL)["down"].swapaxes(1, 2)
    np.testing.assert_array_equal(block.experts.down_EFH.load(), down[[2, 1, 0]])


NEAR_MISSES = {
    "miscounted": (
        lambda graph: let_read(graph, "clamp", 2, np.asarray(1)),
        "a branch takes the tokens of experts [1, 2], expected those of one expert (at Gather 'gather_2')",
    ),
    "a lost expert": (
        lambda graph: [node_of(graph, name).input.pop() for name in ("grouped_mm_fallback", "grouped_mm_fallback_1")],
        "the router chooses among 3 experts, the graph computes experts [0, 1] only: the exporter lost expert 2 "
        "(at Concat 'grouped_mm_fallback')",
    ),
    "runs put together in another order": (
        lambda graph: node_of(graph, "grouped_mm_fallback_1").input.reverse(),
        "the experts' outputs do not stand in the order of the rows (at Concat 'grouped_mm_fallback_1')",
    ),
    "other tokens": (
        lambda graph: let_read(graph, "div", 1, np.asarray(3)),
        "an expert does not read the tokens that it is weighed for (at GatherND 'index')",
    ),
    "biases of other rows": (
        lambda graph: let_read(graph, "unsqueeze_2", 0, "view"),
        "biases are gathered by other ids than those of the rows (at GatherND 'index_2')",
    ),
    "not put back": (
        lambda graph: let_read(graph, "index_4", 1, "unsqueeze_1"),
        "the weighed outputs are not added up token by token (at ReduceSum 'out')",
    ),
    "weights in no order": (
        lambda graph: let_read(graph, "index_1", 1, "unsqueeze"),
        "the weights are not gathered in the order of sorted ids (at GatherND 'index_1')",
    ),
    "another sum": (
        lambda graph: setattr(node_of(graph, "out"), "op_type", "ReduceMean"),
        "the weighed outputs are not summed over the slots of a token (at Reshape 'view_3')",
    ),
    "another activation": (
        lambda graph: setattr(node_of(graph, "sigmoid"), "op_type", "Tanh"),
        "Mul ends no known activation (at Mul 'mul_1')",
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_is_refused_with_the_node(tmp_path, miss):
    change, reason = NEAR_MISSES[miss]
    assert said(edited(SMALL, tmp_path, change), "grouped") == [f"grouped: {reason}"]


def test_concat_elsewhere_is_no_moe(tmp_path):
    path = saved(Spec(form="batched_mm", unoptimised=True), tmp_path)
    assert grouped.anchors(load_graph(path)) == []
