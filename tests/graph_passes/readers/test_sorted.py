"""Sorted runs: what our own writer writes is read again, JetMoE's too, and near misses are refused."""

import numpy as np
import onnx
import pytest

from graph_passes.describe import inspect_model
from moe_spec.experts_op import Activation
from tests.foreign.table import FOREIGN
from tests.graph_passes.block_models import Spec
from tests.graph_passes.readers.proofs import (
    ONE,
    SCOPE,
    THREE,
    assert_pruned_exactly,
    let_read,
    node_of,
    said,
    written,
)


@pytest.mark.parametrize("keep", [THREE, ONE], ids=["3 of 8", "1 of 8"])
def test_what_was_written_is_pruned_again(tmp_path, keep):
    manifest = assert_pruned_exactly(Spec(form="experts"), tmp_path, keep, form="sorted")
    assert [entry.form for entry in manifest.blocks] == ["sorted"]


def test_jetmoe_is_read_but_its_mixture_of_attention_is_not(zoo):
    model = inspect_model(zoo.foreign("sorted_jetmoe"))
    (block,) = model.blocks
    stored = FOREIGN["sorted_jetmoe"].make().state_dict()["model.layers.0.mlp.output_linear.weight"]
    np.testing.assert_array_equal(block.experts.down_EFH.load(), stored.transpose(1, 2))
    (attention,) = model.unrecognised
    assert attention.layer == "model.layers.0.self_attention.experts.router"
    assert str(attention.refusals[0]).startswith("sorted: GatherND ends no known activation (at GatherND ")


NEAR_MISSES = {
    "counts of other ids": (
        lambda graph: let_read(graph, f"{SCOPE}/slot_hit", 1, np.asarray([0, 1, 1])),
        "Split does not fit the tokens that it gets: sizes do not add up (at Split 'layers.0.mlp/run_0')",
    ),
    "counts of each other's ids": (
        lambda graph: let_read(graph, f"{SCOPE}/slot_hit", 1, np.asarray([0, 2, 1])),
        "a branch takes the tokens of experts [1, 2], expected those of one expert (at Split 'layers.0.mlp/run_0')",
    ),
    "runs of other rows": (
        lambda graph: let_read(graph, f"{SCOPE}/run_0", 0, "x"),
        "the sorted rows are not gathered from tokens (at value 'x')",
    ),
    "tokens of other slots": (
        lambda graph: let_read(graph, f"{SCOPE}/token", 1, np.asarray(3)),
        "an expert does not read the tokens that it is weighed for (at Gather 'layers.0.mlp/sorted_tokens')",
    ),
    "not put back": (
        lambda graph: let_read(graph, f"{SCOPE}/unsorted", 1, f"{SCOPE}/order_1"),
        "the weighed outputs are not added up token by token (at ReduceSum 'layers.0.mlp/out')",
    ),
    "an expert of another kind": (
        lambda graph: setattr(node_of(graph, f"{SCOPE}/relu_2"), "op_type", "Sigmoid"),
        "Sigmoid ends no known activation (at Sigmoid 'layers.0.mlp/relu_2')",
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_is_refused_with_the_node(tmp_path, miss):
    change, reason = NEAR_MISSES[miss]
    path = written(Spec(form="experts", experts=3, gated=False, activation=Activation("relu")), tmp_path, "sorted")
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    assert said(path, "sorted") == [f"sorted: {reason}"]
