"""Weights gathered by id for each token: what our own writer writes is read again, and what others write by hand."""

import numpy as np
import onnx
import pytest

from graph_passes.optimize import optimize
from moe_spec.experts_op import Activation
from tests.graph_passes.block_models import Spec
from tests.graph_passes.readers.proofs import (
    ONE,
    SCOPE,
    THREE,
    assert_pruned_exactly,
    blocks_of,
    in_turn,
    let_read,
    said,
    written,
)
from tests.zoo import RUNNER


@pytest.mark.parametrize("keep", [THREE, ONE], ids=["3 of 8", "1 of 8"])
def test_what_was_written_is_read_and_written_no_more(tmp_path, keep):
    manifest = assert_pruned_exactly(Spec(form="experts", score="sigmoid"), tmp_path, keep, form="gather")
    assert [entry.form for entry in manifest.blocks] == ["gather"]


NEAR_MISSES = {
    "projections of other experts": (
        in_turn(
            lambda graph: graph.node.append(onnx.helper.make_node("Neg", [f"{SCOPE}/top_k_1"], ["others"])),
            lambda graph: let_read(graph, f"{SCOPE}/up_weight", 1, "others"),
        ),
        "the projections are of different experts (at MatMul 'layers.0.mlp/up')",
    ),
    "a sum over tokens": (
        lambda graph: let_read(graph, "out", 1, np.asarray([0, 2])),
        "ReduceSum sums the axes (T, K, 1, H) over another than K (at ReduceSum 'layers.0.mlp/out')",
    ),
    "weights of tokens for slots": (
        lambda graph: let_read(graph, f"{SCOPE}/weights_column", 1, np.asarray([0, 3])),
        "Mul lets the axis (K) meet (T) (at Mul 'layers.0.mlp/gated')",
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_is_refused_with_the_node(tmp_path, miss):
    change, reason = NEAR_MISSES[miss]
    path = written(Spec(form="experts", experts=4, gated=False, activation=Activation("relu")), tmp_path, "gather")
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    assert said(path, "gather") == [f"gather: {reason}"]


BY_HAND = """
    k = Constant<value_ints = [2]>()
    flat = Constant<value_ints = [-1]>()
    rows = Constant<value_ints = [-1, 4]>()
    by_token = Constant<value_ints = [-1, 2, 4]>()
    repeat = Constant<value_ints = [1, 2, 1]>()
    first = Constant<value_ints = [1]>()
    last = Constant<value_ints = [-1]>()
    logits = MatMul(x, router)
    scores = Softmax<axis = -1>(logits)
    best, ids = TopK(scores, k)
    flat_ids = Reshape(ids, flat)
    once = Unsqueeze(x, first)
    twice = Expand(once, repeat)
    tokens = Reshape(twice, rows)
    columns = Unsqueeze(tokens, last)
    up_here = Gather(up, flat_ids)
    projected = MatMul(up_here, columns)
    middle = Relu(projected)
    down_here = Gather(down, flat_ids)
    outputs = MatMul(down_here, middle)
    flat_outputs = Squeeze(outputs, last)
    grouped = Reshape(flat_outputs, by_token)
    weights = Unsqueeze(best, last)
    gated = Mul(grouped, weights)
    out = ReduceSum<keepdims = 0>(gated, first)
"""


def test_a_graph_by_hand_with_flat_ids_and_weights_on_the_left_is_read(tmp_path):
    text = f'<ir_version: 10, opset_import: ["" : 20]> model (float[n, 4] x) => (float[n, 4] out) {{ {BY_HAND} }}'
    model, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("router", (4, 3)), ("up", (3, 6, 4)), ("down", (3, 4, 6)))
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.save(model, tmp_path / "model.onnx")
    (block,) = blocks_of(tmp_path / "model.onnx", "gather")
    np.testing.assert_array_equal(block.experts.up_EHF.load(), arrays["up"].transpose(0, 2, 1))
    np.testing.assert_array_equal(block.experts.down_EFH.load(), arrays["down"].transpose(0, 2, 1))
    optimize(tmp_path / "model.onnx", tmp_path / "out", RUNNER, form="dense")
