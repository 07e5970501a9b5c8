"""What torch.onnx writes for torch's functions, with its optimiser and without (``Spec.unoptimised``)."""

from typing import Any

import numpy as np
from onnx import TensorProto

from tests.graph_passes.block_models.builder import Builder, Operand

FAR = np.iinfo(np.int64).max


def linear(
    b: Builder,
    x: str,
    name: str,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    rank: int = 2,
    out: str = "linear",
) -> str:
    """``x @ weight.T + bias`` of (..., in), (out, in) and (out,)."""
    if b.spec.linear == "gemm" and rank == 2:
        operands = [b.weight(f"{name}.weight", weight)]
        operands += [] if bias is None else [b.weight(f"{name}.bias", bias)]
        return b.op("Gemm", x, *operands, out=out, alpha=1.0, beta=1.0, transA=0, transB=1)
    product = b.op("MatMul", x, transposed(b, f"{name}.weight", weight), out=out)
    return product if bias is None else b.op("Add", product, b.weight(f"{name}.bias", bias), out=out)


def transposed(b: Builder, name: str, weight: np.ndarray) -> str:
    """A parameter with its last two axes exchanged: folded into what is stored, or left to a Transpose."""
    rank = weight.ndim
    perm = [*range(rank - 2), rank - 1, rank - 2]
    if b.spec.unoptimised:
        return b.op("Transpose", b.weight(name, weight), perm=perm)
    return b.weight(name, weight.transpose(perm))


def chunk(b: Builder, x: str, axis: int, rank: int) -> tuple[str, str]:
    """``x`` in two halves along ``axis``."""
    if not b.spec.unoptimised:
        first, second = split(b, x, axis % rank, 2)
        return first, second
    sequence = b.op("SplitToSequence", x, np.asarray(b.spec.width), out="split", axis=-1, keepdims=1)
    first, second = (b.op("SequenceAt", sequence, np.asarray(half), out="getitem") for half in (0, 1))
    return first, second


def split(b: Builder, x: str, axis: int, pieces: int) -> list[str]:
    """``x`` in equal pieces."""
    counted: dict[str, Any] = {"num_outputs": pieces} if b.spec.opset >= 18 else {}
    return b.ops("Split", x, out=["split"] * pieces, axis=axis, **counted)


def index(b: Builder, value: str, rank: int, *indices: str) -> str:
    """``value[indices]``, each of shape (n,); ``value`` has ``rank`` axes."""
    if not b.spec.unoptimised:
        columns = [b.op("Unsqueeze", one, [-1]) for one in indices]
        column = columns[0] if len(columns) == 1 else b.op("Concat", *columns, axis=-1)
        return b.op("GatherND", value, column, out="index", batch_dims=0)
    same = b.op("Transpose", value, perm=range(rank))
    shape = b.op("Shape", b.op("Max", *indices), start=0)
    columns = [b.op("Unsqueeze", b.op("Expand", one, shape), [-1]) for one in indices]
    gathered = b.op("GatherND", same, b.op("Concat", *columns, axis=-1), batch_dims=0)
    return b.op("Transpose", gathered, out="index", perm=range(1 + rank - len(indices)))


def index_put(b: Builder, value: str, rank: int, rows: str, update: str, reduction: str = "none") -> str:
    """``value[rows] = update``, or ``+= update`` where ``reduction`` is ``add``."""
    column, added = b.op("Unsqueeze", rows, [-1]), {"reduction": reduction} if reduction != "none" else {}
    if not b.spec.unoptimised:
        return b.op("ScatterND", value, column, update, out="index_put", **added)
    rest = b.op("Gather", b.op("Shape", value, start=0), np.arange(1, rank), axis=0)
    shape = b.op("Concat", b.op("Shape", rows, start=0), rest, axis=0)
    wide = b.op("Expand", b.op("Transpose", update, perm=range(rank)), shape)
    same = b.op("Transpose", value, perm=range(rank))
    written = b.op("ScatterND", same, b.op("Concat", column, axis=-1), wide, **added)
    return b.op("Transpose", written, out="index_put", perm=range(rank))


def number(b: Builder, value: float, like: str, element_type: int = TensorProto.FLOAT) -> str:
    """A number in the type of ``like``, which is ``element_type``."""
    if not b.spec.unoptimised:
        return b.constant(b.scalar(value, element_type))
    kind = np.int64 if element_type == TensorProto.INT64 else np.float32
    return b.op("CastLike", np.asarray(value, kind), like)


def arange(b: Builder, count: int) -> str:
    """``[0 ... count - 1]``."""
    if not b.spec.unoptimised:
        return b.constant(np.arange(count))
    limits = [b.op("Cast", np.asarray(limit), to=TensorProto.INT64) for limit in (0, count, 1)]
    return b.op("Range", *limits, out="arange")


def one_hot(b: Builder, ids: str, classes: int) -> str:
    """int64 (..., classes)."""
    hit = b.op("Equal", b.op("Unsqueeze", ids, [-1]), arange(b, classes), out="eq")
    return b.op("Cast", hit, out="_to_copy", to=TensorProto.INT64)


def zeros_like(b: Builder, x: str, element_type: int) -> str:
    """Zeros of the given type in the shape of ``x``."""
    shape = b.op("Shape", x, start=0)
    if not b.spec.unoptimised:
        return b.op("Expand", b.scalar(0, element_type), shape, out="zeros_like")
    same = b.spec.dtype == "float32"
    zero = b.op("CastLike", np.asarray(0), x) if same else b.op("Cast", np.asarray(0), to=element_type)
    return b.op("Expand", zero, shape, out="zeros_like")


def reshape(b: Builder, x: str, shape: list[int]) -> str:
    """``x.view(shape)`` where one axis is -1."""
    if not b.spec.unoptimised:
        return b.op("Reshape", x, shape, out="view", allowzero=1)
    return b.op("Reshape", x, b.op("Concat", *([dim] for dim in shape), axis=0), out="view", allowzero=1)


def select(b: Builder, x: str, axis: int, at: int) -> str:
    """One slice, without its axis."""
    return b.op("Gather", x, np.asarray(at), out="select", axis=axis)


def columns(b: Builder, x: str, start: int, end: int, step: int = 1, axis: int = 1) -> str:
    """``x[..., start:end:step]``."""
    if not b.spec.unoptimised:
        return b.op("Slice", x, [start], [end], [axis], [step], out="slice")

    def bound(value: int) -> str:
        return b.op("Reshape", b.op("Cast", np.asarray(value), to=TensorProto.INT64), [-1], allowzero=0)

    everything = b.op("Slice", x, bound(0), bound(FAR), bound(0), [1], out="slice")
    return b.op("Slice", everything, bound(start), bound(end), bound(axis), [step], out="slice")


def reduce_max(b: Builder, x: str, *, keepdims: int, out: str = "getitem") -> str:
    """Over the last axis."""
    if b.spec.opset >= 18:
        axes: Operand = [-1] if not b.spec.unoptimised else b.op("Reshape", np.asarray(-1), [-1], allowzero=0)
        return b.op("ReduceMax", x, axes, out=out, keepdims=keepdims, noop_with_empty_axes=0)
    return b.op("ReduceMax", x, out=out, axes=[-1], keepdims=keepdims)


def total(b: Builder, x: Operand, axis: int, *, keepdims: int = 0, out: str = "sum") -> str:
    return b.op("ReduceSum", x, [axis], out=out, keepdims=keepdims, noop_with_empty_axes=0)


def half_total(b: Builder, x: str, axis: int, *, is_float: bool) -> str:
    """The sum over ``axis`` in the model's type, added up in float32."""
    if b.spec.dtype == "float32":
        return total(b, x, axis)
    summed = total(b, x if is_float else to_float(b, x), axis)
    return b.op("Cast", summed, out="_to_copy", to=b.element_type)


def to_float(b: Builder, x: str) -> str:
    """``x.float()``: nothing where the model is float32."""
    return x if b.spec.dtype == "float32" else b.op("Cast", x, out="_to_copy", to=TensorProto.FLOAT)


def to_model(b: Builder, x: str) -> str:
    """A float32 value in the model's type."""
    return x if b.spec.dtype == "float32" else b.op("Cast", x, out="_to_copy", to=b.element_type)
