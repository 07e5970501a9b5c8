"""A quantised weight in standard ops: its bytes as they are, and the ``DequantizeLinear`` that gives their values.

The operator knows one scale (since opset 13), one for each entry of one axis, and runs of values along one axis that
share a scale while no other axis shares any (since opset 21). Scales of any other shape are repeated until they are
one of these; scales that are quantised get an operator of their own. Values are never touched, but for unsigned ones
whose only zero point is the middle: those are stored signed, with no zero point, which TensorRT takes alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from graph_passes.weights.weight import Array, Weight, bits_of, from_array
from moe_spec.errors import UserError

SINCE = {
    "int8": 13,
    "uint8": 13,
    "float8_e4m3fn": 19,
    "float8_e5m2": 19,
    "int4": 21,
    "uint4": 21,
    "float4_e2m1fn": 23,
}
"""The opset from which the operator takes a dtype."""

BLOCKED_SINCE = 21


@dataclasses.dataclass(frozen=True)
class Dequantization:
    """The inputs and attributes of the operator."""

    values: Weight
    scales: Weight
    zero_points: Weight | None
    attributes: Mapping[str, int]


def dequantization(weight: Weight, opset: int, name: str) -> Dequantization:
    """How to write the quantised ``weight``, called ``name``, in a graph of ``opset``.

    Raises:
        UserError: the operator of that opset cannot say it.
    """
    weight = _signed(weight)
    assert weight.scales is not None
    lengths, shared = weight.shape, weight.scales.shape
    varying = [axis for axis, length in enumerate(shared) if length > 1]
    since = SINCE.get(weight.dtype.name)
    if since is None or opset < since:
        raise _refusal(name, weight, "in this type", since, opset)
    if len(varying) <= 1 and weight.scales.scales is None:
        return _one_axis(weight, varying)
    if opset < BLOCKED_SINCE:
        raise _refusal(name, weight, "with scales along two axes", BLOCKED_SINCE, opset)
    axis = max(range(len(lengths)), key=lambda axis: (lengths[axis] // shared[axis], axis))
    wanted = tuple(shared[other] if other == axis else length for other, length in enumerate(lengths))
    return Dequantization(
        weight.values,
        _with_one_scale(repeated(weight.scales, wanted)),
        None if weight.zero_points is None else repeated(weight.zero_points, wanted),
        {"axis": axis, "block_size": lengths[axis] // shared[axis]},
    )


def _with_one_scale(scales: Weight) -> Weight:
    """Scales whose own scales, of experts that were stored one by one, are one number: TensorRT takes no more."""
    if scales.scales is None:
        return scales
    own = scales.scales.load()
    if not (own == own.flat[0]).all():
        return scales
    return dataclasses.replace(scales, scales=from_array(own.reshape(-1)[:1].reshape((1,) * own.ndim)))


def repeated(weight: Weight, shape: Sequence[int]) -> Weight:
    """Scales or zero points with each entry repeated until they have ``shape``."""
    if weight.shape == tuple(shape):
        return weight
    if weight.scales is not None:
        return dataclasses.replace(repeated(weight.values, shape), scales=weight.scales, zero_points=weight.zero_points)
    counts = [wanted // length for wanted, length in zip(shape, weight.shape, strict=True)]

    def repeat(array: Array) -> Array:
        for axis, count in enumerate(counts):
            array = np.repeat(array, count, axis)
        return array

    if counts[0] == 1:
        return weight.map(tuple(shape), repeat, row_wise=True)
    return weight.map(tuple(shape), repeat).cached()


def shifted(weight: Weight, offset: int, dtype: npt.DTypeLike) -> Weight:
    """Integers of 4 or 8 bits, so much higher, in ``dtype``.

    >>> from graph_passes.weights.weight import from_array
    >>> shifted(from_array(np.array([-8, 0, 7], "int4")), 8, "uint4").load().tolist()
    [0, 8, 15]
    """
    dtype = np.dtype(dtype)
    whole = np.uint8 if dtype.name.startswith("u") else np.int8
    moved = weight.map(
        weight.shape, lambda array: (array.astype(np.int16) + offset).astype(whole).astype(dtype), row_wise=True
    )
    return dataclasses.replace(moved, dtype=dtype)


def _signed(weight: Weight) -> Weight:
    """``weight`` without zero points where they are the middle of unsigned numbers."""
    zeros, middle = weight.zero_points, 2 ** (bits_of(weight.dtype) - 1)
    if zeros is None or math.prod(zeros.shape) != 1 or not weight.dtype.name.startswith("uint"):
        return weight
    if int(zeros.load().item()) != middle:
        return weight
    values = shifted(weight.values, -middle, weight.dtype.name.removeprefix("u"))
    return dataclasses.replace(values, scales=weight.scales, cast_to=weight.cast_to)


def _one_axis(weight: Weight, varying: Sequence[int]) -> Dequantization:
    """One scale, or one for each entry of an axis."""
    axis = varying[0] if varying else 0
    wanted = tuple(length if varying and other == axis else 1 for other, length in enumerate(weight.shape))
    flat = (weight.shape[axis],) if varying else ()
    scales, zeros = (
        None if part is None else repeated(part, wanted).map(flat, lambda array: array.reshape(flat))
        for part in (weight.scales, weight.zero_points)
    )
    assert scales is not None
    return Dequantization(weight.values, scales, zeros, {"axis": axis} if varying else {})


def _refusal(name: str, weight: Weight, what: str, since: int | None, opset: int) -> UserError:
    known = "no opset can" if since is None else f"opset {since} can, the graph has {opset}"
    return UserError(
        f"{name} is quantised to {weight.dtype.name}, which DequantizeLinear must read {what}: {known}",
        hint="keep the form that the layer has, or convert the model to a newer opset first",
    )
