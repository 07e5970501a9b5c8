"""What an ONNX file refers to, read from its protobuf bytes: a device has no onnx package.

Only the skeleton is walked (field numbers of ``onnx.proto``); weights stored in the file are stepped over, so this is
quick whatever the size. It answers what a runtime must know before it opens a file that somebody else wrote: does every
byte that the graph reads exist, and inside the model's directory; and which number formats are in it.
"""

import dataclasses
import mmap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import inside, require_file

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16", 17: "float8e4m3fn", 18: "float8e4m3fnuz",
    19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4", 23: "float4e2m1",
    14: "complex64", 15: "complex128", 24: "float8e8m0", 25: "uint2", 26: "int2", 27: "float6e2m3", 28: "float6e3m2",
}  # fmt: skip
"""``TensorProto.DataType``."""
_OF_WEIGHTS = frozenset({"int8", "int4", "uint4", "int2", "uint2"})  # uint8 is packed bytes, or an image
_EXTERNAL = 1  # TensorProto.DataLocation

# Where tensors hide: message -> field -> message. Fields that are not named here are stepped over.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor of the file. ``location`` is None where its bytes are in the file itself."""

    name: str
    dtype: str
    location: str | None
    offset: int
    length: int


def read_tensors(path: Path) -> list[TensorRef]:
    """Every tensor of an ONNX file: initialisers, and constants in nodes, subgraphs and functions.

    Raises:
        UserError: the file is missing, or no complete ONNX file.
    """
    require_file(path, "an ONNX model")
    broken = UserError(f"{path} is no complete ONNX file", hint="copy or export the model again")
    if path.stat().st_size == 0:
        raise broken
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # unmapped once nothing refers to it
    try:
        return list(_tensors(memoryview(mapped), "model"))
    except (ValueError, IndexError, RecursionError) as error:
        raise broken from error


def check_external_data(path: Path) -> list[TensorRef]:
    """The tensors of ``path``, once every byte they refer to was found inside its directory.

    Raises:
        UserError: the file is broken; or a data file is missing, outside the directory, or shorter than what is read.
    """
    tensors = read_tensors(path)
    ends: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.location is not None:
            ends[tensor.location] = max(ends[tensor.location], tensor.offset + tensor.length)
    for location, end in sorted(ends.items()):
        data = inside(path.parent, location, path)
        hint = "copy both files again, or export the model again"
        if not data.is_file():
            raise UserError(f"{data} is missing, {path.name} keeps its weights there", hint=hint)
        if data.stat().st_size < end:
            raise UserError(f"{data} has {data.stat().st_size} bytes, {path.name} reads {end} of it", hint=hint)
    return tensors


def locations_of(path: Path) -> set[str]:
    """The files beside ``path`` that hold its weights, as it names them.

    Raises:
        UserError: the file is missing, or no complete ONNX file.
    """
    return {tensor.location for tensor in read_tensors(path) if tensor.location is not None}


def float_types(tensors: list[TensorRef]) -> list[str]:
    """Names of the floating types among ``tensors``, sorted."""
    return sorted({tensor.dtype for tensor in tensors if "float" in tensor.dtype})


def number_formats(tensors: list[TensorRef]) -> list[str]:
    """Names of the types among ``tensors`` that kernels are made for: floating ones, integers of weights; sorted."""
    return sorted({tensor.dtype for tensor in tensors if "float" in tensor.dtype or tensor.dtype in _OF_WEIGHTS})


def _tensors(message: memoryview, kind: str) -> Iterator[TensorRef]:
    if kind == "tensor":
        yield _tensor(message)
        return
    for field, value in _fields(message):
        child = _INSIDE[kind].get(field)
        if child is not None and isinstance(value, memoryview):
            yield from _tensors(value, child)


def _tensor(message: memoryview) -> TensorRef:
    name, dtype, external, entries = "", 0, False, {}
    for field, value in _fields(message):
        if field == 2 and isinstance(value, int):
            dtype = value
        elif field == 8 and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif field == 13 and isinstance(value, memoryview):
            entry = {number: str(part, "utf-8") for number, part in _fields(value) if isinstance(part, memoryview)}
            entries[entry.get(1, "")] = entry.get(2, "")
        elif field == 14:
            external = value == _EXTERNAL
    return TensorRef(
        name=name,
        dtype=_DTYPES.get(dtype, f"type {dtype}"),
        location=entries.get("location", "") if external else None,
        offset=int(entries.get("offset", 0)),
        length=int(entries.get("length", 0)),
    )


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field; https://protobuf.dev/programming-guides/encoding/."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield field, value
        elif wire == _BYTES:
            length, at = _varint(message, at)
            if at + length > len(message):
                raise ValueError("a field reaches beyond its message")
            yield field, message[at : at + length]
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
