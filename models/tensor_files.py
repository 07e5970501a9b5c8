"""Tensors in safetensors files as ranges of bytes: cut and copied from file to file, never held in memory.

The format (https://github.com/huggingface/safetensors#format): the header's length as 8 bytes, little-endian; a JSON
object of ``{name: {dtype, shape, data_offsets}}``; the bytes of all tensors, row by row, without a gap.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import safetensors

from moe_spec.errors import UserError
from moe_spec.progress import Progress, silent

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000
"""Of the tensors in one file; a larger tensor has a file of its own."""

AGAIN = "get the checkpoint again, complete"
_METADATA = {"format": "pt"}
_LENGTH_BYTES = 8
_PIECE_BYTES = 1 << 18
"""Read and written at once: what stays in a core's cache, in the same memory again and again."""


@dataclasses.dataclass(frozen=True)
class Span:
    """``length`` bytes of a file, from ``start`` on."""

    path: Path
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor whose bytes lie in files.

    Attributes:
        dtype: safetensors' word, e.g. ``BF16``.
        shape: of any rank.
        spans: where its bytes lie, in order.
    """

    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        """Length of all spans together."""
        return sum(span.length for span in self.spans)

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def has_rows(self, count: int, *, in_runs: bool = False) -> bool:
        """Whether it has ``count`` rows: (count, ...), or (1, count); with ``in_runs`` (count F, H), F of each."""
        runs = in_runs and len(self.shape) == 2 and self.shape[0] % count == 0
        return self.shape[:1] == (count,) or self.shape == (1, count) or runs

    def rows(self, keep: Sequence[int], count: int | None = None) -> "StoredTensor":
        """``w (E, ...) -> w[keep] (Ek, ...)``, or ``w (1, E) -> w[:, keep] (1, Ek)``, of a tensor in one piece.

        Of (E F, H) the F rows of each id stay together.

        Args:
            keep: ids of rows.
            count: E; None: what axis 0 has.

        >>> bias_E = StoredTensor("F32", (3,), (Span(Path("a"), 100, 12),))
        >>> [span.start for span in bias_E.rows([0, 2]).spans]
        [100, 108]
        """
        (whole,) = self.spans
        count = self.shape[0] if count is None else count
        length, rest = divmod(whole.length, count)
        assert rest == 0, "a row of values below a byte ends within one"
        spans = tuple(Span(whole.path, whole.start + row * length, length) for row in keep)
        if self.shape == (1, count):
            return StoredTensor(self.dtype, (1, len(keep)), spans)
        return StoredTensor(self.dtype, (len(keep) * (self.shape[0] // count), *self.shape[1:]), spans)


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """What lies where in a safetensors file; only its header is read.

    Raises:
        UserError: the file is missing, cut, or none.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # here the header is checked: against the file's length, and shapes against offsets
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is no complete safetensors file: {error}", hint=AGAIN) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    first = _LENGTH_BYTES + length
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), (Span(path, first + start, end - start),))
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    }


def write_tensors(
    tensors: Mapping[str, StoredTensor],
    directory: Path,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress = silent,
) -> None:
    """Write model.safetensors, or where that would be larger than ``shard_bytes`` shards and their index.

    ``on_progress`` is told of the bytes of all tensors.

    Raises:
        UserError: a file that is read became shorter meanwhile.
    """
    shards = list(_shards(tensors, shard_bytes))
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def tell(length: int) -> None:
        nonlocal done
        done += length
        on_progress("writing weights", done, total)

    if len(shards) == 1:
        _write_file(directory / WEIGHTS, tensors, shards[0], tell)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(directory / file_name, tensors, names, tell)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Mapping[str, StoredTensor], shard_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, filled in the given order."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _write_file(
    path: Path, tensors: Mapping[str, StoredTensor], names: Sequence[str], tell: Callable[[int], None]
) -> None:
    """In safetensors' own order: wide values first, so that each tensor starts at a multiple of its value's width.

    ``tell`` hears how long each tensor is that was written.
    """
    ordered = sorted(names, key=lambda name: (-tensors[name].nbytes / max(1, tensors[name].size), name))
    header: dict[str, object] = {"__metadata__": _METADATA}
    end = 0
    for name in ordered:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": tensors[name].dtype, "shape": tensors[name].shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for name in ordered:
            for span in tensors[name].spans:
                _copy(span, file, buffer)
            tell(tensors[name].nbytes)


def _copy(span: Span, target: IO[bytes], buffer: memoryview) -> None:
    with span.path.open("rb", buffering=0) as source:
        source.seek(span.start)
        left = span.length
        while left:
            length = source.readinto(buffer[: min(left, len(buffer))])
            if not length:
                raise UserError(f"{span.path} was cut while it was read", hint=AGAIN)
            target.write(buffer[:length])
            left -= length
