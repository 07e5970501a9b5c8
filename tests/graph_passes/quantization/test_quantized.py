"""Quantised weights keep their bytes through every form that can say them; what cannot is refused."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.graph.dequantize import dequantization
from graph_passes.optimize import optimize
from graph_passes.weights.weight import Weight, from_array
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL
from tests.graph_passes.block_models import plan, why_not
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import ALL, ONE, THREE, assert_pruned_exactly, edited, said, saved
from tests.zoo import RUNNER

WIDE: dict[str, Any] = {"hidden": 64, "width": 32, "opset": 21}
KINDS = ("int8", "uint8", "int4", "fp8", "matmulnbits")
SOURCES = ("batched_mm", "stacked", "masked_loop", "nonzero", "grouped", "dispatch")
POSSIBLE = [
    (source, kind)
    for source in SOURCES
    for kind in KINDS
    if why_not(spec_of(source, quantization=kind, **WIDE)) is None
]
CODES = {"int8": "int8", "uint8": "uint8", "int4": "int4", "fp8": "float8_e4m3fn", "matmulnbits": "uint4"}


@pytest.mark.parametrize(("source", "kind"), POSSIBLE)
@pytest.mark.parametrize("form", ["sorted", "dense", "gather"])
def test_quantised_experts_are_pruned_exactly(tmp_path, source, kind, form):
    assert_pruned_exactly(spec_of(source, quantization=kind, **WIDE), tmp_path, THREE, form=form)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [ONE, ALL], ids=["1 of 8", "all"])
def test_one_expert_and_all_of_them(tmp_path, kind, keep):
    manifest = assert_pruned_exactly(spec_of("nonzero", quantization=kind, **WIDE), tmp_path, keep)
    assert manifest.modified == (keep == ONE)


@pytest.mark.parametrize(("source", "kind"), POSSIBLE)
def test_values_scales_and_zero_points_of_kept_experts_are_the_original_ones(tmp_path, source, kind):
    spec = spec_of(source, quantization=kind, biased=True, **WIDE)
    assert_pruned_exactly(spec, tmp_path, THREE, form="sorted")
    before, after = (read_model(tmp_path / path).blocks[0] for path in ("block.onnx", "out"))
    assert after.experts.up_EHF.dtype.name == CODES[kind]
    for old, new in zip(before.experts.weights(), after.experts.weights(), strict=True):
        assert new.values.load().tobytes() == old.values.load()[list(THREE)].tobytes()
        for mine, theirs in ((old.scales, new.scales), (old.zero_points, new.zero_points)):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                kept = np.broadcast_to(mine.load(), (8, *mine.shape[1:]))[list(THREE)]
                left, right = np.broadcast_arrays(kept, theirs.load())
                np.testing.assert_array_equal(left, right)


def test_matmulnbits_nodes_stay_such_nodes(tmp_path):
    for zero_points in (False, True):
        spec = spec_of("masked_loop", quantization="matmulnbits", zero_points=zero_points, biased=True, **WIDE)
        folder = tmp_path / str(zero_points)
        folder.mkdir()
        assert_pruned_exactly(spec, folder, THREE, form="sorted")
        nodes = [node for node in onnx.load(folder / "out" / MODEL).graph.node if node.op_type == "MatMulNBits"]
        assert len(nodes) == 9
        assert {len(node.input) for node in nodes} == {4 if zero_points else 3}


@pytest.mark.parametrize("kind", ["int8", "uint8", "int4", "matmulnbits"])
def test_integers_are_packed_for_qmoe_without_a_change(tmp_path, kind):
    spec = spec_of("nonzero", "softmax_renormalised", quantization=kind, **WIDE)
    assert_pruned_exactly(spec, tmp_path, THREE, form="qmoe")
    before, after = (read_model(tmp_path / path).blocks[0].experts for path in ("block.onnx", "out"))
    for old, new in zip(before.weights(), after.weights(), strict=True):
        np.testing.assert_array_equal(stands_for(old)[list(THREE)], stands_for(new))


def stands_for(weight: Weight) -> np.ndarray:
    """(E, in, out) the numbers that a quantised weight means."""
    assert weight.scales is not None
    scales, zeros = (
        weight.scales.load(),
        np.zeros((1, 1, 1)) if weight.zero_points is None else weight.zero_points.load(),
    )
    for axis, length in enumerate(weight.shape):
        scales, zeros = (np.repeat(part, length // part.shape[axis], axis) for part in (scales, zeros))
    return (weight.values.load().astype(np.float32) - zeros.astype(np.float32)) * scales


def test_fp8_has_no_place_in_qmoe(tmp_path):
    source = saved(spec_of("nonzero", quantization="fp8", **WIDE), tmp_path)
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, form="qmoe")
    assert error.value.what == (
        "form qmoe cannot express layer layers.0.mlp: "
        "the op takes one integer type of 4 or 8 bits, this layer has float8_e4m3fn"
    )


def test_blocks_are_refused_where_the_opset_cannot_say_them(tmp_path):
    spec = spec_of("qmoe", **{**WIDE, "opset": 20})
    source = saved(spec, tmp_path)
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, plan=plan(spec, THREE, onnx_sha256(source)), form="sorted")
    assert error.value.what == (
        "weight experts.0.gate of layer layers.0.mlp is quantised to int4, "
        "which DequantizeLinear must read in this type: opset 21 can, the graph has 20"
    )
    assert error.value.hint == "keep the form that the layer has, or convert the model to a newer opset first"
    assert not (tmp_path / "out").exists()


def test_a_quantised_router_is_refused(tmp_path):
    """Its scores would be rounded, so which experts it takes; graphs that have it are told so."""

    def quantise(graph: onnx.GraphProto) -> None:
        linear = next(node for node in graph.node if node.op_type == "Gemm")
        weight = next(value for value in graph.initializer if value.name == linear.input[1])
        shape = tuple(weight.dims)
        weight.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, np.int8), weight.name))
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(0.1, np.float32), "scale"))
        node = onnx.helper.make_node("DequantizeLinear", [weight.name, "scale"], ["router.float"], "dequantize")
        linear.input[1] = "router.float"
        graph.node.insert(0, node)

    path = edited(spec_of("nonzero", quantization="int8", **WIDE), tmp_path, quantise)
    assert said(path, "nonzero") == ["nonzero: the router's weight is no constant matrix (at Gemm 'logits')"]


def test_scales_of_any_shape_become_what_the_operator_knows():
    values = from_array(np.arange(96).astype(np.int8).reshape(2, 6, 8))
    for shape, wanted, attributes in (
        ((1, 1, 1), (), {}),
        ((2, 1, 1), (2,), {"axis": 0}),
        ((1, 3, 1), (6,), {"axis": 1}),
        ((2, 1, 8), (2, 1, 8), {"axis": 1, "block_size": 6}),
        ((2, 6, 2), (2, 6, 2), {"axis": 2, "block_size": 4}),
        ((2, 3, 2), (2, 6, 2), {"axis": 2, "block_size": 4}),
    ):
        scales = from_array(np.random.default_rng(0).random(shape, np.float32))
        parts = dequantization(dataclasses.replace(values, scales=scales), 21, "w")
        assert (parts.scales.shape, parts.attributes) == (wanted, attributes)
        assert parts.scales.load().shape == wanted


def test_four_bits_need_a_later_opset_than_eight():
    scales = from_array(np.ones((1, 1), np.float32))
    four = dataclasses.replace(from_array(np.ones((2, 2)).astype(ml_dtypes.int4)), scales=scales)
    with pytest.raises(UserError, match="w is quantised to int4, which DequantizeLinear must read in this type"):
        dequantization(four, 20, "w")
    assert dequantization(four, 21, "w").attributes == {}
