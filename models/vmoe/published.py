"""Arrays of a google-research/vmoe checkpoint, without JAX and without pickle: msgpack files, read as untrusted.

https://github.com/google-research/vmoe/blob/main/vmoe/checkpoints. ``PREFIX.index`` has the version, the number of
shards, and a tree of names; each leaf says shape and dtype of an array. An array's id is its place among the leaves,
names sorted. ``PREFIX.data-00000-of-00004`` and so on have pieces of arrays by id, each with its place in the array.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError

Array = npt.NDArray[Any]

VERSION = "20220622"
"""The only one in which ids can be told without the program that wrote them."""

DTYPES: Mapping[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "int32": np.int32,
    "uint32": np.uint32,
}

INDEX_BYTES = 2**28
"""A longer index is none: it has some hundred bytes an array."""

_AGAIN = "get PREFIX.index and every PREFIX.data-*-of-* again, complete"
_CHUNKS = "__msgpack_array_chunk_a87ca2__"
_ARRAY, _SCALAR, _SLICES, _LEAF = 1, 3, 6, 8
_BROKEN = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, msgpack.UnpackException)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Shape and dtype of an array, as the index says them."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * int(np.dtype(self.dtype).itemsize)


def read_arrays(prefix: Path) -> dict[str, Array]:
    """Every array of the checkpoint ``prefix``, by its names in the tree with ``/`` between them.

    No array is allocated before the pieces that the files hold are as long as the array that the index describes.

    Raises:
        UserError: a file is missing, cut or of another format or version, or pieces do not make up an array.
    """
    shards, leaves = _read_index(prefix.with_name(f"{prefix.name}.index"))
    paths = [prefix.with_name(f"{prefix.name}.data-{shard:05}-of-{shards:05}") for shard in range(shards)]
    _require_room(paths, leaves)
    pieces: dict[int, list[tuple[Array, tuple[slice, ...]]]] = {number: [] for number in range(len(leaves))}
    for path in paths:
        with _explained(path):
            for number, piece, place in _read_pieces(path):
                pieces[number].append((piece, place))
    return {name: _joined(name, leaf, pieces[number]) for number, (name, leaf) in enumerate(leaves.items())}


def _read_index(path: Path) -> tuple[int, dict[str, Leaf]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist", hint="give the prefix of a checkpoint: what stands before .index")
    if path.stat().st_size > INDEX_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, an index has {INDEX_BYTES:,} at most", hint=_AGAIN)
    with _explained(path):
        index = msgpack.unpackb(path.read_bytes(), ext_hook=_decoded)
        version, shards, tree = index.get("version"), int(index["shard_count"]), index["index"]
        if version == VERSION:
            if not 1 <= shards <= 99_999:
                raise ValueError(f"{shards} shards")
            return shards, dict(_leaves(tree))
    raise UserError(
        f"{path} is of version {version!r}, only {VERSION!r} can be read without the program that wrote it",
        hint="restore it with google-research/vmoe and save it again",
    )


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Leaf]]:
    if isinstance(tree, Leaf):
        yield name, tree
    elif tree is not None:
        for key in sorted(tree):  # so does JAX count leaves
            yield from _leaves(tree[key], f"{name}/{key}" if name else key)


def _require_room(paths: list[Path], leaves: Mapping[str, Leaf]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} is missing, its index names it", hint=_AGAIN)
    there, wanted = sum(path.stat().st_size for path in paths), sum(leaf.nbytes for leaf in leaves.values())
    if there < wanted:
        raise UserError(f"{paths[0].parent} has {there:,} bytes for arrays of {wanted:,}", hint=_AGAIN)


def _read_pieces(path: Path) -> Iterator[tuple[int, Array, tuple[slice, ...]]]:
    content = msgpack.unpackb(path.read_bytes(), ext_hook=_decoded)
    if content.pop(_CHUNKS) is not True:
        raise ValueError("no pieces of arrays")
    for number, chunks in content.items():
        for parts, place in chunks:
            yield int(number), np.concatenate([part.reshape(-1) for part in parts]), place


def _joined(name: str, leaf: Leaf, pieces: list[tuple[Array, tuple[slice, ...]]]) -> Array:
    problem = UserError(f"the pieces of {name} do not make up an array of {list(leaf.shape)}", hint=_AGAIN)
    lengths = [[axis.stop - axis.start for axis in place] for _, place in pieces]
    inside = all(
        len(place) == len(leaf.shape)
        and all(0 <= axis.start <= axis.stop <= length for axis, length in zip(place, leaf.shape, strict=True))
        for _, place in pieces
    )
    if not inside or any(
        math.prod(shape) != piece.size or piece.dtype != leaf.dtype
        for shape, (piece, _) in zip(lengths, pieces, strict=True)
    ):
        raise problem
    if sum(piece.size for piece, _ in pieces) != math.prod(leaf.shape):
        raise problem
    array, filled = np.empty(leaf.shape, leaf.dtype), np.zeros(leaf.shape, bool)
    for shape, (piece, place) in zip(lengths, pieces, strict=True):
        array[place], filled[place] = piece.reshape(shape), True
    if not filled.all():  # pieces of the right length in sum, one upon another
        raise problem
    return array


def _decoded(code: int, data: bytes) -> Any:
    """Values of flax and of google-research/vmoe; shapes are never larger than the bytes that came with them."""
    if code in (_ARRAY, _SCALAR):
        shape, dtype, values = msgpack.unpackb(data, raw=True)
        return np.frombuffer(values, DTYPES[dtype.decode()]).reshape([int(length) for length in shape])
    if code == _SLICES:
        return tuple(slice(*_three(one)) for one in msgpack.unpackb(data, raw=True))
    if code == _LEAF:
        described, _, _ = msgpack.unpackb(data, raw=True)
        shape, dtype, *_ = msgpack.unpackb(described, raw=True)
        return Leaf(tuple(_length(length) for length in shape), DTYPES[dtype.decode()])
    raise ValueError(f"an unknown value of kind {code}")


def _three(data: bytes) -> tuple[int, int, int | None]:
    start, stop, step = msgpack.unpackb(data, raw=True)
    if step not in (None, 1):
        raise ValueError(f"a step of {step}")
    return _length(start or 0), _length(stop), None


def _length(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no length")
    return value


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise UserError(
            f"{path} is no file of a google-research/vmoe checkpoint: {type(error).__name__}: {error}", hint=_AGAIN
        ) from error
