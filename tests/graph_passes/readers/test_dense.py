"""Experts side by side in 2-D weights: what our own writer writes is read again, and cut into experts."""

import numpy as np
import onnx
import pytest

from graph_passes.describe import inspect_model
from moe_spec.experts_op import Activation
from tests.graph_passes.block_models import Spec
from tests.graph_passes.readers.proofs import (
    CLAMPED,
    ONE,
    SCOPE,
    THREE,
    assert_pruned_exactly,
    in_turn,
    let_read,
    node_of,
    said,
    written,
)


@pytest.mark.parametrize("keep", [THREE, ONE], ids=["3 of 8", "1 of 8"])
@pytest.mark.parametrize("fields", [{}, {"biased": True, "interleaved": True, "activation": CLAMPED}], ids=len)
def test_what_was_written_is_read_and_written_no_more(tmp_path, keep, fields):
    spec = Spec(form="experts", score="sigmoid", **fields)
    manifest = assert_pruned_exactly(spec, tmp_path, keep, form="dense")
    assert [entry.form for entry in manifest.blocks] == ["dense"]


def _let_gates_skip(graph: onnx.GraphProto) -> None:
    """Gates of another shape: a row for each expert instead of a column."""
    let_read(graph, f"{SCOPE}/gates_column", 1, np.asarray([1]))


def _turn_gated(graph: onnx.GraphProto) -> None:
    graph.node.append(onnx.helper.make_node("Transpose", [f"{SCOPE}/gated"], ["turned"], perm=[0, 2, 1]))


NEAR_MISSES = {
    "gates beside channels instead of experts": (
        _let_gates_skip,
        "Mul lets the axis (F) meet (E) (at Mul 'layers.0.mlp/gated')",
    ),
    "other groups of channels": (
        lambda graph: let_read(graph, f"{SCOPE}/middle_TEF", 1, np.asarray([-1, 12, 3])),
        "Reshape makes [-1, 12, 3] of the axes (T, E*F) (at Reshape 'layers.0.mlp/middle_TEF')",
    ),
    "channels in another order": (
        in_turn(
            lambda graph: graph.node.append(
                onnx.helper.make_node("Transpose", [f"{SCOPE}/gated"], ["turned"], perm=[0, 2, 1])
            ),
            lambda graph: let_read(graph, f"{SCOPE}/gated_flat", 0, "turned"),
        ),
        None,
    ),
    "channels that are no experts": (
        lambda graph: let_read(graph, f"{SCOPE}/down", 1, np.zeros((37, 8), np.float32)),
        "the weights hold no 3 experts: 37 rows or columns are not 3 runs of one length "
        "(at MatMul 'layers.0.mlp/down')",
    ),
    "a bias that other gates weigh": (
        lambda graph: let_read(graph, f"{SCOPE}/down_bias", 0, f"{SCOPE}/scores"),
        None,
    ),
    "an activation that nobody knows": (
        lambda graph: setattr(node_of(graph, f"{SCOPE}/relu"), "op_type", "Sigmoid"),
        "Sigmoid ends no known activation (at Sigmoid 'layers.0.mlp/relu')",
    ),
}


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_a_near_miss_is_no_dense_layer(tmp_path, miss):
    change, reason = NEAR_MISSES[miss]
    spec = Spec(form="experts", experts=3, gated=False, activation=Activation("relu"), biased=True)
    path = written(spec, tmp_path, "dense")
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    if reason is not None:
        assert said(path, "dense") == [f"dense: {reason}"]
    else:
        found = inspect_model(path)
        assert all(block.experts.down_bias_EH is None for block in found.blocks)
        assert found.blocks or found.unrecognised


def test_a_gated_attention_is_no_moe(tmp_path):
    """Heads taken apart, gated, put together and projected: like experts, but what is gated is no projection."""
    body = """
        w = Constant<value = float[4, 4] {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15}>()
        apart = Constant<value_ints = [-1, 2, 2]>()
        flat = Constant<value_ints = [-1, 4]>()
        last = Constant<value_ints = [2]>()
        query = MatMul(x, w)
        scores = Softmax(query)
        mixed = MatMul(scores, query)
        heads = Reshape(mixed, apart)
        halves = Constant<value_ints = [2, 2]>()
        gate, rest = Split<axis = 1>(query, halves)
        column = Unsqueeze(gate, last)
        gated = Mul(heads, column)
        joined = Reshape(gated, flat)
        out = MatMul(joined, w)"""
    text = f'<ir_version: 10, opset_import: ["" : 20]> model (float[4, 4] x) => (float[4, 4] out) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert said(tmp_path / "model.onnx", "dense") == []
