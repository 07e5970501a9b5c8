"""Recognise one projection ``x @ weight + bias`` with a constant matrix, and the constant behind a computed one."""

import dataclasses

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand, produced_by, producer, scalar, source
from graph_passes.readers.parts.quantized import read_dequantized, read_nbits
from graph_passes.record.block import FormError
from graph_passes.routers import Weights
from graph_passes.weights.weight import Weight


@dataclasses.dataclass(frozen=True)
class Linear:
    """``x (rows, in) @ weight (in, out) + bias (out,)``; ``node`` is the product's."""

    x: gs.Tensor
    weight: Weight
    bias: Weight | None
    node: gs.Node


def read_linear(tensor: gs.Tensor, weights: Weights) -> Linear:
    """The projection that gives ``tensor``: a Gemm, or a MatMul and perhaps an Add.

    Raises:
        FormError: it is none, or its matrix is no constant.
    """
    tensor, added = _strip_bias(source(tensor), weights)
    node = producer(source(tensor))
    if node is None or node.op not in ("Gemm", "MatMul", "MatMulNBits"):
        raise FormError("a projection is no Gemm or MatMul", node or tensor)
    weight, own = _kernel(node, weights)
    if own is not None and added is not None:
        raise FormError("a projection adds two biases", node)
    bias = added if own is None else own
    if len(weight.shape) != 2:
        raise FormError(f"a projection's weight has shape {list(weight.shape)}, expected a matrix", node)
    if bias is not None and bias.shape != weight.shape[1:]:
        raise FormError(f"a bias of shape {list(bias.shape)} does not fit weight {list(weight.shape)}", node)
    return Linear(source(node.inputs[0], {"Identity"}), weight, bias, node)


def _kernel(node: gs.Node, weights: Weights) -> tuple[Weight, Weight | None]:
    """The matrix (in, out) that ``node`` multiplies by, and the bias that it adds itself."""
    if node.op == "MatMulNBits":
        return read_nbits(node, weights)
    weight = read_weight(node.inputs[1], weights)
    if node.op == "MatMul":
        return weight, None
    if any(node.attrs.get(key, 1.0) != 1.0 for key in ("alpha", "beta")) or node.attrs.get("transA", 0):
        raise FormError("a projection scales or transposes what it reads", node)
    bias = operand(node, 2)
    turned = weight.swap() if node.attrs.get("transB", 0) and len(weight.shape) == 2 else weight
    return turned, None if bias is None else _vector(bias, weights)


def read_weight(tensor: gs.Tensor, weights: Weights) -> Weight:
    """The constant behind ``tensor``, in ``tensor``'s axes; only its last two axes may have been swapped.

    It may be quantised. One matrix may be taken out of stacked ones, by Gather or Slice or as an output of Split.

    Raises:
        FormError: it is computed otherwise.
    """
    node = producer(tensor)
    if node is None:
        return weights.of(tensor)
    match node.op:
        case "Identity":
            return read_weight(node.inputs[0], weights)
        case "DequantizeLinear":
            return read_dequantized(node, weights)
        case "Transpose":
            inner = read_weight(node.inputs[0], weights)
            rank = len(inner.shape)
            if node.attrs.get("perm", [*reversed(range(rank))]) == [*range(rank - 2), rank - 1, rank - 2]:
                return inner.swap()
        case "Cast":
            return _cast(read_weight(node.inputs[0], weights), node)
        case "Gather" | "Squeeze" | "Reshape":
            row = _row(node, weights)
            if row is not None:
                return row
    raise FormError("a weight is no constant", node)


def _cast(weight: Weight, node: gs.Node) -> Weight:
    """``weight`` in the dtype that ``node`` casts it to; a quantised one once it is dequantised."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(int(node.attrs["to"]))
    if weight.scales is None:
        return weight.astype(dtype)
    if weight.cast_to is not None:
        raise FormError("a dequantised weight is cast twice", node)
    return dataclasses.replace(weight, cast_to=None if dtype == weight.scales.dtype else dtype)


def _row(node: gs.Node, weights: Weights) -> Weight | None:
    """One matrix of stacked ones: ``Gather(stacked, e)``, or what Split or Slice cut out, without its first axis."""
    if node.op == "Gather":
        index = scalar(node.inputs[1])
        stacked = read_weight(node.inputs[0], weights)
        if index is None or len(node.inputs[1].shape) or node.attrs.get("axis", 0) or len(stacked.shape) < 2:
            return None
        return stacked.one(int(index) % stacked.shape[0])
    cut = produced_by(node.inputs[0], "Split", "Slice")
    stacked = read_weight(node.inputs[0] if cut is None else cut.inputs[0], weights)
    index = _place(cut, node.inputs[0], stacked.shape[0])
    return None if index is None or len(stacked.shape) < 2 else stacked.one(index)


def _place(cut: gs.Node | None, part: gs.Tensor, experts: int) -> int | None:
    """Which single row of axis 0 ``part`` is; the only one where nothing is cut."""
    if cut is None:
        return 0 if experts == 1 else None
    if cut.op == "Split":
        whole = len(cut.outputs) == experts and cut.attrs.get("axis", 0) == 0
        return next(index for index, output in enumerate(cut.outputs) if output is part) if whole else None
    start, end, axis = (scalar(operand(cut, index)) for index in (1, 2, 3))
    return int(start) if start is not None and start >= 0 and end == start + 1 and axis == 0 else None


def _strip_bias(tensor: gs.Tensor, weights: Weights) -> tuple[gs.Tensor, Weight | None]:
    """``(x, b)`` of ``x + b`` with a constant vector on either side."""
    node = produced_by(tensor, "Add")
    if node is None:
        return tensor, None
    for this, other in ((0, 1), (1, 0)):
        constant = source(node.inputs[other])
        if isinstance(constant, gs.Constant) and not isinstance(node.inputs[this], gs.Constant):
            return node.inputs[this], _vector(node.inputs[other], weights)
    raise FormError("a projection adds something that is no constant", node)


def _vector(tensor: gs.Tensor, weights: Weights) -> Weight:
    """A bias (out,), which may be stored with leading axes of 1."""
    vector = read_weight(tensor, weights)
    if int(np.prod(vector.shape[:-1], dtype=np.int64)) != 1:
        raise FormError(f"a bias has shape {list(vector.shape)}, expected a vector", tensor)
    return vector if len(vector.shape) == 1 else vector.map(vector.shape[-1:], lambda array: array.reshape(-1))
