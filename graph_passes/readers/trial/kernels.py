"""What the ops compute that find, gather, sort and scatter tokens, in numpy, with ONNX's meaning.

Floats are float64 whatever the graph says, integers int64: a reader tries where values go, not how they are rounded.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.weights.weight import Array

Inputs = Sequence[Any]
"""Arrays; None where an input is left out."""

Kernel = Callable[[gs.Node, Inputs], Any]
"""Gives an array, or a list of them where an op has several outputs."""

MOST_ENTRIES = 1 << 26
"""Of a value: a graph that nobody vouches for must not fill the memory."""

WIDE = {"f": np.float64, "i": np.int64, "u": np.int64, "b": np.bool_}
"""What values of a kind are computed with."""


def widened(array: Array) -> Array:
    """``array`` in the one dtype of its kind; ``ml_dtypes`` are floats."""
    return array.astype(WIDE.get(array.dtype.kind, np.float64))


def _bounded(shape: Iterable[int]) -> tuple[int, ...]:
    """``shape``, refused where an array of it would be too large."""
    sizes = tuple(int(size) for size in shape)
    if math.prod(sizes) > MOST_ENTRIES:
        raise ValueError(f"it would have shape {list(sizes)}")
    return sizes


def _attribute(node: gs.Node, inputs: Inputs, name: str, index: int) -> Any:
    """A list of integers, an attribute in old opsets and input ``index`` in new ones; None where left out."""
    given = inputs[index] if index < len(inputs) else None
    if given is not None:
        return [int(value) for value in np.ravel(given)]
    stated = node.attrs.get(name)
    return None if stated is None else [int(value) for value in np.ravel(stated)]


def _cast(node: gs.Node, inputs: Inputs) -> Any:
    kind = onnx.helper.tensor_dtype_to_np_dtype(int(node.attrs["to"])).kind
    return inputs[0].astype(WIDE.get(kind, np.float64))


def _reshape(node: gs.Node, inputs: Inputs) -> Any:
    array, shape = inputs
    keeps = not node.attrs.get("allowzero", 0)
    return array.reshape([array.shape[axis] if size == 0 and keeps else size for axis, size in enumerate(shape)])


def _flatten(node: gs.Node, inputs: Inputs) -> Any:
    (array,) = inputs
    axis = int(node.attrs.get("axis", 1))
    return array.reshape(int(np.prod(array.shape[:axis], dtype=np.int64)), -1)


def _squeeze(node: gs.Node, inputs: Inputs) -> Any:
    axes = _attribute(node, inputs, "axes", 1)
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


def _unsqueeze(node: gs.Node, inputs: Inputs) -> Any:
    axes = _attribute(node, inputs, "axes", 1)
    return np.expand_dims(inputs[0], tuple(axes))


def _expand(_: gs.Node, inputs: Inputs) -> Any:
    array, shape = inputs
    return np.broadcast_to(array, np.broadcast_shapes(array.shape, _bounded(shape)))


def _shape(node: gs.Node, inputs: Inputs) -> Any:
    return np.asarray(inputs[0].shape[node.attrs.get("start", 0) : node.attrs.get("end")], np.int64)


def _constant_of_shape(node: gs.Node, inputs: Inputs) -> Any:
    value = node.attrs.get("value")
    filler = 0.0 if value is None else np.asarray(value.values).reshape(())
    return widened(np.full(_bounded(inputs[0]), filler))


def _split(node: gs.Node, inputs: Inputs) -> Any:
    array = inputs[0]
    axis, sizes = int(node.attrs.get("axis", 0)), _attribute(node, inputs, "split", 1)
    if sizes is None:
        size = -(-array.shape[axis] // len(node.outputs))
        ends = [size * (index + 1) for index in range(len(node.outputs) - 1)]
    else:
        ends = list(np.cumsum(sizes)[:-1])
        if sum(sizes) != array.shape[axis] or len(sizes) != len(node.outputs):
            raise ValueError("sizes do not add up")
    return np.split(array, ends, axis)


def _slice(node: gs.Node, inputs: Inputs) -> Any:
    array = inputs[0]
    starts, ends = _attribute(node, inputs, "starts", 1), _attribute(node, inputs, "ends", 2)
    axes = _attribute(node, inputs, "axes", 3) or list(range(len(starts)))
    steps = _attribute(node, inputs, "steps", 4) or [1] * len(starts)
    chosen: list[slice] = [slice(None)] * array.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        chosen[axis] = slice(start, None if step < 0 and end < -array.shape[axis] else end, step)
    return array[tuple(chosen)]


def _gather(node: gs.Node, inputs: Inputs) -> Any:
    return np.take(inputs[0], inputs[1], int(node.attrs.get("axis", 0)))


def _gather_nd(node: gs.Node, inputs: Inputs) -> Any:
    array, places = inputs
    if node.attrs.get("batch_dims", 0):
        raise ValueError("batch_dims is not 0")
    return array[tuple(np.moveaxis(places, -1, 0))]


def _gather_elements(node: gs.Node, inputs: Inputs) -> Any:
    return np.take_along_axis(inputs[0], inputs[1], int(node.attrs.get("axis", 0)))


def _reduction(node: gs.Node) -> bool:
    """Whether a scatter adds instead of overwriting."""
    reduction = node.attrs.get("reduction", "none")
    if reduction not in ("none", "add"):
        raise ValueError(f"it reduces by {reduction}")
    return bool(reduction == "add")


def _scatter_nd(node: gs.Node, inputs: Inputs) -> Any:
    array, places, updates = inputs
    return _scatter(array, tuple(np.moveaxis(places, -1, 0)), updates, adds=_reduction(node))


def _scatter_elements(node: gs.Node, inputs: Inputs) -> Any:
    array, places, updates = inputs
    where: list[Array] = list(np.indices(places.shape, sparse=True))
    where[int(node.attrs.get("axis", 0))] = places
    return _scatter(array, tuple(where), updates, adds=_reduction(node))


def _scatter(array: Array, where: tuple[Array, ...], updates: Array, *, adds: bool) -> Any:
    result = array.astype(np.result_type(array, updates))
    if adds:
        np.add.at(result, where, updates)
    else:
        result[where] = updates
    return result


def _top_k(node: gs.Node, inputs: Inputs) -> Any:
    """Among equals the first is the best, as ONNX wants it."""
    array, count = inputs
    axis = int(node.attrs.get("axis", -1))
    ranked = -array if node.attrs.get("largest", 1) else array
    order = np.take(np.argsort(ranked, axis, kind="stable"), np.arange(int(np.ravel(count)[0])), axis)
    return [np.take_along_axis(array, order, axis), order]


def _reduce_sum(node: gs.Node, inputs: Inputs) -> Any:
    axes = _attribute(node, inputs, "axes", 1)
    if axes is None and node.attrs.get("noop_with_empty_axes", 0):
        return inputs[0]
    keeps = bool(node.attrs.get("keepdims", 1))
    return np.sum(inputs[0], None if axes is None else tuple(axes), keepdims=keeps)


def _cum_sum(node: gs.Node, inputs: Inputs) -> Any:
    array, axis = inputs
    if node.attrs.get("reverse", 0):
        raise ValueError("it runs backwards")
    total = np.cumsum(array, int(np.ravel(axis)[0]))
    return total - array if node.attrs.get("exclusive", 0) else total


def _one_hot(node: gs.Node, inputs: Inputs) -> Any:
    ids, depth, values = inputs
    if node.attrs.get("axis", -1) not in (-1, ids.ndim):
        raise ValueError("its axis is not the last")
    (classes,) = _bounded(np.ravel(depth))
    hit = np.mod(ids, classes)[..., None] == np.arange(classes)
    return np.where(hit, values[1], values[0])


def _clip(node: gs.Node, inputs: Inputs) -> Any:
    low, high = (inputs[index] if index < len(inputs) else None for index in (1, 2))
    low, high = (node.attrs.get("min") if low is None else low, node.attrs.get("max") if high is None else high)
    return np.clip(inputs[0], low, high)


def _divide(_: gs.Node, inputs: Inputs) -> Any:
    left, right = inputs
    if left.dtype.kind == "f":
        return left / right
    quotient = np.abs(left) // np.abs(right)  # integers are cut towards zero
    return quotient * np.sign(left) * np.sign(right)


def _range(_: gs.Node, inputs: Inputs) -> Any:
    start, limit, step = (np.ravel(value)[0] for value in inputs)
    _bounded([int((limit - start) // step)])
    return np.arange(start, limit, step)


def _tile(_: gs.Node, inputs: Inputs) -> Any:
    array, repeats = inputs
    _bounded(np.multiply(array.shape, repeats))
    return np.tile(array, repeats)


def _plain(function: Callable[..., Any]) -> Kernel:
    """A kernel of one function of all inputs, without attributes."""
    return lambda _, inputs: function(*inputs)


KERNELS: Mapping[str, Kernel] = {
    "Abs": _plain(np.abs),
    "Add": _plain(np.add),
    "And": _plain(np.logical_and),
    "Cast": _cast,
    "CastLike": lambda _, inputs: inputs[0].astype(inputs[1].dtype),
    "Clip": _clip,
    "Concat": lambda node, inputs: np.concatenate(inputs, int(node.attrs["axis"])),
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cum_sum,
    "Div": _divide,
    "Equal": _plain(np.equal),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _plain(np.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Greater": _plain(np.greater),
    "GreaterOrEqual": _plain(np.greater_equal),
    "Identity": _plain(np.asarray),
    "Less": _plain(np.less),
    "LessOrEqual": _plain(np.less_equal),
    "Max": _plain(lambda *terms: np.maximum.reduce(np.broadcast_arrays(*terms))),
    "Mod": lambda node, inputs: (np.fmod if node.attrs.get("fmod", 0) else np.mod)(*inputs),
    "Mul": _plain(np.multiply),
    "Neg": _plain(np.negative),
    "NonZero": lambda _, inputs: np.asarray(np.nonzero(inputs[0]), np.int64),
    "Not": _plain(np.logical_not),
    "OneHot": _one_hot,
    "Or": _plain(np.logical_or),
    "Range": _range,
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Sign": _plain(np.sign),
    "Size": lambda _, inputs: np.asarray(inputs[0].size),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": _plain(np.subtract),
    "Sum": _plain(lambda *terms: sum(terms)),
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": lambda node, inputs: np.transpose(inputs[0], node.attrs.get("perm")),
    "Unsqueeze": _unsqueeze,
    "Where": _plain(np.where),
}
"""One row an op."""
