"""Quantised weights as graphs hold them: constants behind ``DequantizeLinear`` or inside ``com.microsoft.MatMulNBits``.

Values stay as they are stored; scales and zero points get the rank of the values (see ``Weight``).
"""

import dataclasses
import math

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import is_weight, operand, produced_by, source
from graph_passes.readers.parts.contrib import integer
from graph_passes.record.block import FormError
from graph_passes.routers import Weights
from graph_passes.weights.packing import unpacked
from graph_passes.weights.weight import Weight, from_array

INTEGERS = {4: ml_dtypes.uint4, 8: np.uint8}
"""The dtype of what contrib ops store as so many bits; their zero point is the middle where none is given."""


def is_stored(tensor: gs.Tensor, rank: int) -> bool:
    """Whether ``tensor`` is a constant of that rank, or one that is dequantised."""
    return is_weight(source(tensor, {"DequantizeLinear"}), rank)


def read_dequantized(node: gs.Node, weights: Weights) -> Weight:
    """The constant that a DequantizeLinear dequantises: for the whole tensor, along one axis, or in blocks.

    Raises:
        FormError: values, scales or zero points are computed, or do not fit together.
    """
    values, zeros = (None if (tensor := operand(node, index)) is None else weights.of(tensor) for index in (0, 2))
    assert values is not None
    scales = _read_scales(node.inputs[1], weights)
    axis, size = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    shape = _scales_shape(values.shape, scales.shape, axis % max(len(values.shape), 1), size)
    if shape is None or (zeros is not None and zeros.shape != scales.shape):
        raise FormError(f"scales {list(scales.shape)} do not fit values {list(values.shape)} along axis {axis}", node)
    if scales.scales is not None and scales.shape != shape:
        raise FormError("scales that are quantised are not in blocks", node)
    return dataclasses.replace(
        values,
        scales=_in_shape(scales, shape),
        zero_points=None if zeros is None else _in_shape(zeros, shape),
    )


def _read_scales(tensor: gs.Tensor, weights: Weights) -> Weight:
    """Scales, which a DequantizeLinear of their own may give, as in nvfp4."""
    node = produced_by(tensor, "DequantizeLinear")
    return weights.of(tensor) if node is None else read_dequantized(node, weights)


def read_nbits(node: gs.Node, weights: Weights) -> tuple[Weight, Weight | None]:
    """The matrix (in, out) and the bias of a MatMulNBits node, which stores it as (out, blocks, bytes).

    Raises:
        FormError: a layout that cannot be written again.
    """
    if len(node.inputs) < 3:
        raise FormError(f"MatMulNBits has {len(node.inputs)} inputs, expected at least 3", node)
    inputs, outputs, bits, size = (integer(node, key, 4) for key in ("K", "N", "bits", "block_size"))
    if bits not in INTEGERS or size < 1 or inputs % size or operand(node, 4) is not None:
        raise FormError(f"MatMulNBits has {bits} bits, {inputs} inputs in blocks of {size}, or a group index", node)
    blocks, stored = inputs // size, weights.of(node.inputs[1])
    if stored.dtype != np.uint8 or stored.shape != (outputs, blocks, size * bits // 8):
        raise FormError(f"MatMulNBits has weights {stored.dtype.name}{list(stored.shape)} for {outputs} outputs", node)
    octets = stored.map((outputs, inputs * bits // 8), lambda rows: rows.reshape(len(rows), -1), row_wise=True)
    values = unpacked(octets, INTEGERS[bits])
    scales = _entries(node, weights.of(node.inputs[2]), (outputs, blocks))
    given, bias = operand(node, 3), operand(node, 5)
    zeros = from_array(np.full((1, 1), 2 ** (bits - 1)).astype(INTEGERS[bits]))
    if given is not None:
        packed = weights.of(given)
        if packed.dtype != np.uint8:
            raise FormError(f"MatMulNBits has zero points of type {packed.dtype.name}, expected uint8", node)
        row = -(-blocks * bits // 8)
        entries = unpacked(_entries(node, packed, (outputs, row)), INTEGERS[bits])
        zeros = entries.map((outputs, blocks), lambda rows: rows[:, :blocks], row_wise=True)
    level = integer(node, "accuracy_level", 0)
    weight = dataclasses.replace(values, scales=scales, zero_points=zeros, matmul_nbits=level).swap()
    return weight, None if bias is None else weights.of(bias)


def _scales_shape(values: tuple[int, ...], scales: tuple[int, ...], axis: int, size: int) -> tuple[int, ...] | None:
    """The scales' shape in the rank of the values; None where they do not fit."""
    if math.prod(scales) == 1 and not size:
        return (1,) * len(values)
    if not size:
        alone = tuple(length if index == axis else 1 for index, length in enumerate(values))
        return alone if scales == (values[axis],) else None
    blocks = tuple(length // size if index == axis else length for index, length in enumerate(values))
    return blocks if scales == blocks and values[axis] % size == 0 else None


def _in_shape(weight: Weight, shape: tuple[int, ...]) -> Weight:
    return weight if weight.shape == shape else weight.map(shape, lambda array: array.reshape(shape)).cached()


def _entries(node: gs.Node, weight: Weight, shape: tuple[int, int]) -> Weight:
    """Scales or zero points, which older models store flat."""
    if math.prod(weight.shape) != math.prod(shape):
        raise FormError(f"MatMulNBits has scales or zero points {list(weight.shape)}, expected {list(shape)}", node)
    return _in_shape(weight, shape)
