"""Values into the data file beside a graph, a piece at a time: memory need not hold a model, nor a layer of it."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes  # noqa: F401  (numpy learns "bfloat16" by name)
import numpy as np
import onnx
import torch
from torch import Tensor

from exporter.fold import Array, evaluate
from exporter.weightless import Traced
from moe_spec.errors import UserError
from moe_spec.external_data import INLINE_BYTES, aligned, lie_in
from moe_spec.progress import Progress, silent

Pieces = Callable[[str, torch.dtype | None], Iterator[Tensor]]
"""``pieces(name, dtype)``: the values of a parameter in order, cut along the first axis; None: in their own dtype."""


FLOATS: Mapping[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
}

_ONNX_FILE_BYTES = 2**31 - 1


class _DataFile:
    """A file that is hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.size = 0

    def write(self, values: Any) -> None:
        """Append the bytes of a buffer."""
        self._hash.update(values)
        self.size += self._file.write(values)

    @property
    def sha256(self) -> str:
        """Hex digest of what was written."""
        return self._hash.hexdigest()


def save(
    traced: Traced,
    pieces: Pieces,
    path: Path,
    *,
    inline_bytes: int = INLINE_BYTES,
    on_progress: Progress = silent,
) -> dict[str, str]:
    """Write the graph, and its weights beside it in the order in which nodes read them.

    Args:
        traced: the graph, which stays as it is.
        pieces: where values come from.
        path: of the .onnx file; the data file has ``.data`` at the end of its name.
        inline_bytes: smaller weights lie in the .onnx file.
        on_progress: told of the bytes after each weight.

    Returns:
        The sha256 of the data file by its name; empty where nothing lies in one.

    Raises:
        UserError: weights below ``inline_bytes`` are more than an .onnx file can hold.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(traced.proto)
    weights = _in_order(proto.graph)
    _require_room(proto, inline_bytes)
    done, total = 0, bytes_of(traced)
    location = f"{path.name}.data"
    with path.with_name(location).open("wb") as file:
        data = _DataFile(file)
        for tensor in weights:
            done += nbytes(tensor)
            if nbytes(tensor) < inline_bytes:
                tensor.raw_data = b"".join(map(bytes, _values(tensor, traced, pieces)))
            else:
                _append(tensor, data, location, _values(tensor, traced, pieces))
            on_progress("writing weights", done, total)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(weights)
    onnx.save(proto, path)
    if not data.size:
        path.with_name(location).unlink()
    onnx.checker.check_model(str(path))
    return {location: data.sha256} if data.size else {}


def nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes of the values of a tensor, which it need not have."""
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return itemsize * int(math.prod(tensor.dims))


def bytes_of(traced: Traced) -> int:
    """Bytes of all weights of a graph."""
    return sum(map(nbytes, traced.proto.graph.initializer))


def _in_order(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    read = dict.fromkeys(name for node in graph.node for name in node.input if name in tensors)
    return [tensors[name] for name in read | tensors]


def _require_room(proto: onnx.ModelProto, inline_bytes: int) -> None:
    weights = proto.graph.initializer
    inline = sum(size for size in map(nbytes, weights) if size < inline_bytes)
    graph = proto.ByteSize() - sum(len(tensor.raw_data) for tensor in weights)  # constants of the trace have theirs
    if inline + graph > _ONNX_FILE_BYTES:
        raise UserError(
            f"{inline:,} bytes of weights and {graph:,} of the graph would lie in the .onnx file, which holds "
            f"{_ONNX_FILE_BYTES:,}",
            hint="give a smaller --external-data, so that more weights lie in the data file",
        )


def _append(tensor: onnx.TensorProto, data: _DataFile, location: str, values: Iterator[Array]) -> None:
    """Let ``tensor`` lie at the end of the data file."""
    data.write(bytes(aligned(data.size) - data.size))
    offset = data.size
    for piece in values:
        data.write(piece)
    assert data.size - offset == nbytes(tensor), (tensor.name, data.size - offset, nbytes(tensor))
    tensor.ClearField("raw_data")
    lie_in(tensor, location, offset, nbytes(tensor))


def _values(tensor: onnx.TensorProto, traced: Traced, pieces: Pieces) -> Iterator[Array]:
    """The bytes of an initialiser, wherever they come from."""
    if tensor.name in traced.folded:
        recipe = traced.folded[tensor.name]
        read = {value.name: _whole(traced.parameters[value.name], pieces) for value in recipe.graph.input}
        yield evaluate(recipe, read).reshape(-1).view(np.uint8)
    elif tensor.name in traced.parameters:
        yield from map(_bytes, pieces(tensor.name, FLOATS.get(tensor.data_type)))
    else:  # a constant of the trace
        yield np.frombuffer(onnx.numpy_helper.to_array(tensor).tobytes(), np.uint8)


def _whole(parameter: onnx.TensorProto, pieces: Pieces) -> Array:
    values = np.concatenate([_bytes(piece) for piece in pieces(parameter.name, FLOATS.get(parameter.data_type))])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(parameter.data_type)
    return values.view(dtype).reshape(parameter.dims)


def _bytes(values: Tensor) -> Array:
    array: Array = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array
