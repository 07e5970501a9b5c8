"""The weight behind a graph constant, wherever its bytes are: in the file, beside it, or still to be written."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns "int4" and "bfloat16" by name)
import numpy as np
import onnx
import onnx.external_data_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from graph_passes.graph.protos import every_graph
from graph_passes.weights.weight import Array, Rows, Weight, bits_of, byte_count, from_array, select
from moe_spec.errors import UserError
from moe_spec.files import inside

_MEND = "copy or export the model again; its weights lie beside the .onnx file"


class LazyWeight(LazyValues):  # type: ignore[misc]
    """What a graphsurgeon constant holds in place of an array: a ``Weight`` that nobody has read yet."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.shape = list(weight.shape)
        self.dtype = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
        self.nbytes = weight.nbytes

    def load(self) -> Array:
        """The values; graphsurgeon asks for them only where a pass looks at ``.values``."""
        return self.weight.load()


class ExternalValues(LazyValues):  # type: ignore[misc]
    """What a graphsurgeon constant holds in place of an array that lies in a file of ``directory``."""

    def __init__(self, proto: onnx.TensorProto, directory: Path) -> None:
        super().__init__(proto)
        self.directory = directory

    def load(self) -> Array:
        """The values."""
        return np.array(of_proto(self.tensor, self.directory).load())


def constant(name: str, weight: Weight) -> gs.Constant:
    """A graph constant over ``weight``, which is not quantised: scales are constants of their own."""
    assert weight.scales is None
    return gs.Constant(name, LazyWeight(weight))


def of_constant(constant: gs.Constant, directory: Path) -> Weight:
    """The weight behind a graph constant of a model in ``directory``.

    Raises:
        UserError: its external data is missing, cut, or lies outside ``directory``.
    """
    values = constant._values  # `.values` would read and cast
    if isinstance(values, LazyWeight):
        return values.weight
    if not isinstance(values, LazyValues):
        return from_array(np.asarray(values))
    return of_proto(values.tensor, directory)


def of_proto(proto: onnx.TensorProto, directory: Path) -> Weight:
    """The weight that an ONNX file describes; see `of_constant`."""
    check_stored(proto)
    shape, dtype = tuple(proto.dims), dtype_of(proto)
    stored_rows = shape[0] if shape else 1
    if not onnx.external_data_helper.uses_external_data(proto):
        return Weight(shape, dtype, lambda rows: select(onnx.numpy_helper.to_array(proto), rows), stored_rows)
    info = external_info(proto)
    path, offset = _data_file(directory, info.location), info.offset or 0
    _check_extent(proto.name, path, offset, byte_count(shape, dtype))
    read = _read_packed if bits_of(dtype) < dtype.itemsize * 8 else _read
    return Weight(shape, dtype, lambda rows: read(path, offset, shape, dtype, rows), stored_rows)


def check_stored(proto: onnx.TensorProto) -> None:
    """Refuse a tensor whose values are not as many as its shape says; nothing is read or allocated.

    Raises:
        UserError: an unknown type, a negative length, or bytes that are missing or left over.
    """
    shape, dtype = list(proto.dims), dtype_of(proto)
    if dtype.kind == "c":
        raise UserError(f"weight {proto.name} is complex, which is not supported", hint=_MEND)
    if any(length < 0 for length in shape):
        raise UserError(f"weight {proto.name} has the shape {shape}, whose lengths cannot be negative", hint=_MEND)
    if onnx.external_data_helper.uses_external_data(proto):
        external_info(proto)
        return
    if proto.data_type == onnx.TensorProto.STRING:
        found, wanted, unit = len(proto.string_data), math.prod(shape), "strings"
    elif proto.HasField("raw_data"):
        found, wanted, unit = len(proto.raw_data), byte_count(shape, dtype), "bytes"
    else:
        field = onnx.helper.tensor_dtype_to_field(proto.data_type)
        found, wanted, unit = len(getattr(proto, field)), _entries(proto, shape), "values"
    if found != wanted:
        raise UserError(f"weight {proto.name} holds {found} {unit}, {dtype.name}{shape} needs {wanted}", hint=_MEND)


def external_info(proto: onnx.TensorProto) -> onnx.external_data_helper.ExternalDataInfo:
    """Where the bytes of ``proto`` lie.

    Raises:
        UserError: the entry is no file with an offset and a length.
    """
    try:
        return onnx.external_data_helper.ExternalDataInfo(proto)
    except (TypeError, ValueError) as error:
        raise UserError(f"weight {proto.name} has a malformed place: {error}", hint=_MEND) from error


def location_of(proto: onnx.TensorProto) -> str:
    """The file that holds the bytes of ``proto``; nothing where they stand in the .onnx file."""
    if not onnx.external_data_helper.uses_external_data(proto):
        return ""
    return str(external_info(proto).location)


def locations_of(model: onnx.ModelProto) -> tuple[str, ...]:
    """The files that hold weights of ``model``, as it names them."""
    tensors = (tensor for part in every_graph(model.graph) for tensor in _stored(part))
    return tuple(sorted({location for tensor in tensors if (location := location_of(tensor))}))


def _stored(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Initialisers, and what Constant nodes hold."""
    held = [entry.t for node in graph.node for entry in node.attribute if entry.type == onnx.AttributeProto.TENSOR]
    return [*graph.initializer, *held]


def _entries(proto: onnx.TensorProto, shape: Sequence[int]) -> int:
    """How many entries of its typed field hold a tensor; small numbers share one."""
    small = bits_of(dtype_of(proto))
    return -(-math.prod(shape) * small // 8) if small < 8 else math.prod(shape)


def dtype_of(proto: onnx.TensorProto) -> np.dtype[Any]:
    """Numpy's dtype of a stored tensor.

    Raises:
        UserError: ONNX knows no such type.
    """
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    except KeyError as error:
        raise UserError(f"weight {proto.name} has the unknown data type {proto.data_type}", hint=_MEND) from error


def _read(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], rows: Rows | None) -> Array:
    return select(np.memmap(path, dtype, mode="r", offset=offset, shape=shape), rows)


def _read_packed(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], rows: Rows | None) -> Array:
    """Values of which several share a byte, the first in the lowest bits."""
    count, a_byte = int(np.prod(shape, dtype=np.int64)), 8 // bits_of(dtype)
    packed: Array = np.memmap(path, np.uint8, mode="r", offset=offset, shape=(-(-count // a_byte),))
    if shape and (count // max(shape[0], 1)) % a_byte == 0:  # rows end where bytes end: no other is unpacked
        packed = select(packed.reshape(shape[0], -1), rows)
        return _unpack(packed, dtype).reshape(-1, *shape[1:])
    return select(_unpack(packed, dtype)[:count].reshape(shape), rows)


def _unpack(packed: Array, dtype: np.dtype[Any]) -> Array:
    bits = bits_of(dtype)
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    unpacked: Array = np.stack(parts, axis=-1).reshape(-1).view(dtype)
    return unpacked


def packed_bytes(array: Array) -> Array:
    """``array`` as its bytes are stored in an ONNX file.

    >>> packed_bytes(np.array([1, -1, 2], "int4")).tolist()
    [241, 2]
    """
    bits = bits_of(array.dtype)
    if bits == 8 * array.dtype.itemsize:
        return np.ascontiguousarray(array)
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8) & ((1 << bits) - 1)
    flat = np.pad(flat, (0, -flat.size % (8 // bits))).reshape(-1, 8 // bits)
    joined: Array = np.bitwise_or.reduce(flat << np.arange(0, 8, bits, dtype=np.uint8), axis=1)
    return joined


def place_in(directory: Path, array: Array) -> tuple[str, int] | None:
    """The file of ``directory``, and the offset in it, that ``array`` is one run of bytes of; None where it is not."""
    if not isinstance(array, np.memmap) or not array.flags.c_contiguous or array.filename is None:
        return None
    whole = array
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    file = Path(array.filename)
    if not file.is_relative_to(directory.resolve()):
        return None
    offset = whole.offset + array.ctypes.data - whole.ctypes.data
    return file.relative_to(directory.resolve()).as_posix(), offset


@functools.lru_cache(maxsize=64)
def _data_file(directory: Path, location: str) -> Path:
    return inside(directory, location, directory / "model.onnx")


def _check_extent(name: str, path: Path, offset: int, length: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise UserError(f"{path} does not exist, but weight {name} lies in it", hint=_MEND)
    if offset + length > size:
        raise UserError(
            f"{path} has {size} bytes, but weight {name} needs bytes {offset} to {offset + length}: the file is cut",
            hint=_MEND,
        )
