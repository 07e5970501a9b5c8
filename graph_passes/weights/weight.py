"""Weights that stay on disk until they are written: what graphsurgeon cannot hold is dealt with here.

graphsurgeon casts bf16, int4 and fp8 when it looks at values, and an initialiser may be larger than memory. A
``Weight`` knows where its bytes are and what is to be done with them; only ``load`` and ``pieces`` read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = tuple[int, ...]
Source = Callable[[Rows | None], Array]
"""Reads the given rows of axis 0 of a stored tensor, or all of it."""

SMALL = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}
"""Bits of the dtypes of which several share a byte."""

PIECE_BYTES = 1 << 24
"""How much of a weight is in memory while it is written."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor that is read on demand.

    A quantised one stands for ``(values - zero_points) * scales``. Both have the rank of the values; each of their axes
    has the values' length, or 1, or a divisor of it where runs of values (blocks) share a scale.

    Attributes:
        shape: of what ``load`` gives.
        dtype: numpy dtype of what ``load`` gives (``ml_dtypes`` for bf16, fp8, int4).
        source: reads the stored tensor, memory-mapped where it lies in a file of its own.
        stored_rows: length of axis 0 of what ``source`` reads.
        rows: which rows of axis 0 are taken, None for all.
        transform: what is done with the rows taken.
        row_wise: whether ``transform`` treats rows one by one, so that a part of the rows gives a part of the result.
        swapped: whether the last two axes are swapped at the end.
        scales: of a quantised weight; they may be quantised themselves, with scales of the same rank.
        zero_points: of a quantised weight, where they are not 0.
        matmul_nbits: ``accuracy_level`` of the com.microsoft.MatMulNBits node that multiplies by it, so that another
            is written for it; None where none does.
        cast_to: dtype of what a quantised weight is multiplied with, where that is not the scales' dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    source: Source
    stored_rows: int
    rows: Rows | None = None
    transform: Callable[[Array], Array] | None = None
    row_wise: bool = True
    swapped: bool = False
    scales: "Weight | None" = None
    zero_points: "Weight | None" = None
    matmul_nbits: int | None = None
    cast_to: np.dtype[Any] | None = None

    @property
    def values(self) -> "Weight":
        """A quantised weight without its scales and zero points: the numbers that are stored."""
        return dataclasses.replace(self, scales=None, zero_points=None, matmul_nbits=None, cast_to=None)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, and of scales and zero points, as they are stored."""
        extra = sum(part.nbytes for part in (self.scales, self.zero_points) if part is not None)
        return byte_count(self.shape, self.dtype) + extra

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """What the weight is computed with: the scales' dtype where it is quantised, or what that is cast to."""
        return self.dtype if self.scales is None else self.cast_to or self.scales.float_dtype

    def take(self, rows: Sequence[int]) -> "Weight":
        """The rows ``rows`` of axis 0, with their scales; only they are read."""
        assert self.row_wise
        chosen = tuple(rows) if self.rows is None else tuple(self.rows[row] for row in rows)
        taken = dataclasses.replace(self, shape=(len(chosen), *self.shape[1:]), rows=chosen)
        return taken._with_parts(lambda part: part.take(rows) if part.shape[0] == self.shape[0] else part)

    def one(self, row: int) -> "Weight":
        """Row ``row`` without axis 0."""
        taken = self.take([row])
        squeezed = dataclasses.replace(taken, scales=None, zero_points=None).map(self.shape[1:], lambda rows: rows[0])
        parts = (None if part is None else part.one(row if part.shape[0] > 1 else 0) for part in self._parts())
        scales, zero_points = parts
        return dataclasses.replace(squeezed, scales=scales, zero_points=zero_points)

    def swap(self) -> "Weight":
        """The last two axes swapped."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return dataclasses.replace(self, shape=shape, swapped=not self.swapped)._with_parts(Weight.swap)

    def half(self, axis: int, index: int, *, interleaved: bool = False) -> "Weight":
        """Half ``index`` of ``axis`` (not 0): the first or the second run, or every other entry.

        Raises:
            ValueError: a block of shared scales would be cut.
        """
        assert 0 < axis < len(self.shape)
        return self._half(axis, index, self.shape[axis], interleaved)

    def _half(self, axis: int, index: int, length: int, interleaved: bool) -> "Weight":
        if self.shape[axis] == 1 and length > 1:
            return self
        if self.shape[axis] % 2 or (interleaved and self.shape[axis] != length):
            raise ValueError("gate and up share a block of quantised values")
        size, stored = self.shape[axis] // 2, self._stored_axis(axis)
        chosen = slice(index, None, 2) if interleaved else slice(index * size, (index + 1) * size)
        part = self._then(lambda array: array[(slice(None),) * stored + (chosen,)])
        part = dataclasses.replace(part, shape=(*self.shape[:axis], size, *self.shape[axis + 1 :]))
        return part._with_parts(lambda inner: inner._half(axis, index, length, interleaved))

    def cut(self, count: int, axis: int = 0) -> "Weight":
        """``axis`` cut into ``count`` runs that become axis 0: (E N, M) along 0, or (N, E M) along 1, as (E, N, M).

        Raises:
            ValueError: the runs are not of one length, or a block of shared scales would be cut.
        """
        return self._cut(count, axis, self.shape[axis])

    def _cut(self, count: int, axis: int, length: int) -> "Weight":
        if self.shape[axis] == 1 and length > 1:
            split = (*self.shape[:axis], 1, 1, *self.shape[axis + 1 :])
        elif count < 1 or self.shape[axis] % count:
            raise ValueError(f"{self.shape[axis]} rows or columns are not {count} runs of one length")
        else:
            split = (*self.shape[:axis], count, self.shape[axis] // count, *self.shape[axis + 1 :])
        whole = self.values

        def read(rows: Rows | None) -> Array:  # views: of a memory-mapped weight only the runs that are used are read
            return select(np.moveaxis(whole.load().reshape(split), axis, 0), rows)

        shape = (split[axis], *split[:axis], *split[axis + 1 :])
        plain = Weight(shape, self.dtype, read, shape[0])
        runs = dataclasses.replace(plain, scales=self.scales, zero_points=self.zero_points, cast_to=self.cast_to)
        return runs._with_parts(lambda part: part._cut(count, axis, length))

    def joined(self) -> "Weight":
        """(E, N, M) as (E N, M)."""
        experts, rows, columns = self.shape
        flat = self.values.map((experts * rows, columns), lambda array: array.reshape(-1, columns), row_wise=True)
        scales, zero_points = (None if part is None else part._joined(experts) for part in self._parts())
        return dataclasses.replace(flat, scales=scales, zero_points=zero_points, cast_to=self.cast_to)

    def _joined(self, experts: int) -> "Weight":
        """Scales (E or 1, N, M) of a weight of ``experts``: repeated for each where they share them and have rows."""
        if self.shape[:2] == (1, 1):
            return self.one(0)
        if self.shape[0] == experts:
            return self.joined()
        assert self.scales is None, "one for all experts, and with rows"
        shape = (experts, *self.shape[1:])
        return self.map(shape, lambda array: np.broadcast_to(array, shape)).joined()

    def map(self, shape: tuple[int, ...], transform: Callable[[Array], Array], *, row_wise: bool = False) -> "Weight":
        """``transform`` of this weight, of shape ``shape``, once it is read; no quantised weight.

        With ``row_wise``, the transform of some rows is that part of the transform of all.
        """
        assert self.scales is None
        plain = self._then(_swap) if self.swapped else self
        mapped = dataclasses.replace(plain._then(transform), shape=shape, swapped=False)
        return dataclasses.replace(mapped, row_wise=self.row_wise and row_wise)

    def astype(self, dtype: npt.DTypeLike) -> "Weight":
        """The values in another dtype; no quantised weight."""
        assert self.scales is None
        if self.dtype == np.dtype(dtype):
            return self
        return dataclasses.replace(self._then(lambda array: array.astype(dtype)), dtype=np.dtype(dtype))

    def cached(self) -> "Weight":
        """The same, read once and only when it is needed; its rows can be taken. For small weights."""
        read = functools.cache(self.load)
        rows = self.shape[0] if self.shape else 1
        return Weight(self.shape, self.dtype, lambda chosen: select(read(), chosen), rows)

    def load(self) -> Array:
        """Read the rows taken and transform them."""
        return self._load(self.rows)

    def pieces(self) -> Iterator[Array]:
        """What ``load`` gives, in runs that are as large as `PIECE_BYTES`, or one row."""
        rows = self.rows if self.rows is not None else tuple(range(self.stored_rows))
        if not self.row_wise or not rows:
            yield self.load()
            return
        size = max(1, PIECE_BYTES * len(rows) // max(1, byte_count(self.shape, self.dtype)))
        for start in range(0, len(rows), size):
            yield self._load(rows[start : start + size], whole=size >= len(rows))

    def _load(self, rows: Rows | None, *, whole: bool = True) -> Array:
        array = self.source(rows)
        if self.transform is not None:
            array = self.transform(array)
        array = _swap(array) if self.swapped else array
        assert not whole or array.shape == self.shape, (array.shape, self.shape)
        return array

    def _then(self, transform: Callable[[Array], Array]) -> "Weight":
        before = self.transform
        after = transform if before is None else lambda array: transform(before(array))
        return dataclasses.replace(self, transform=after)

    def _stored_axis(self, axis: int) -> int:
        """Where ``axis`` is before the last two are swapped."""
        last = len(self.shape) - 1
        return 2 * last - 1 - axis if self.swapped and axis >= last - 1 else axis

    def _parts(self) -> tuple["Weight | None", "Weight | None"]:
        return self.scales, self.zero_points

    def _with_parts(self, change: Callable[["Weight"], "Weight"]) -> "Weight":
        if self.scales is None:
            return self
        zero_points = None if self.zero_points is None else change(self.zero_points)
        return dataclasses.replace(self, scales=change(self.scales), zero_points=zero_points)


def _swap(array: Array) -> Array:
    return array.swapaxes(-1, -2)


def byte_count(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Bytes of a stored tensor; two 4-bit values share one.

    >>> byte_count((3, 3), np.dtype("float32")), byte_count((3,), np.dtype("int4"))
    (36, 2)
    """
    return -(-math.prod(shape) * bits_of(dtype) // 8)


def bits_of(dtype: np.dtype[Any]) -> int:
    """Bits of one stored value."""
    return SMALL.get(dtype.name, 8 * dtype.itemsize)


def from_array(array: Array) -> Weight:
    """A weight that is in memory already."""
    return Weight(array.shape, array.dtype, lambda rows: select(array, rows), len(array) if array.ndim else 1)


def stack(weights: Sequence[Weight]) -> Weight:
    """Weights of one shape and dtype that are stored one by one, as the rows of one weight.

    Raises:
        ValueError: shapes, dtypes or quantisation differ.
    """
    first = weights[0]
    kinds = {
        (
            weight.shape,
            weight.dtype,
            weight.scales is None,
            weight.zero_points is None,
            weight.matmul_nbits,
            weight.cast_to,
        )
        for weight in weights
    }
    if len(kinds) != 1:
        raise ValueError("experts have weights of different shapes or types")

    def read(rows: Rows | None) -> Array:
        chosen = tuple(range(len(weights))) if rows is None else rows
        if len(chosen) == 1:  # a view: what lies in a file can be told to lie there
            return weights[chosen[0]].load()[None]
        return np.stack([weights[row].load() for row in chosen])

    scales = None if first.scales is None else stack([weight.scales for weight in weights if weight.scales is not None])
    zeros = [weight.zero_points for weight in weights if weight.zero_points is not None]
    return Weight(
        (len(weights), *first.shape),
        first.dtype,
        read,
        len(weights),
        scales=scales,
        zero_points=stack(zeros) if zeros else None,
        matmul_nbits=first.matmul_nbits,
        cast_to=first.cast_to,
    )


def alternate(first: Weight, second: Weight) -> Weight:
    """(E, N, ...) twice as (E, 2 N, ...) whose axis 1 takes turns; quantised ones must have scales of one shape."""
    assert first.shape == second.shape
    assert (first.scales is None) == (second.scales is None)

    def read(rows: Rows | None) -> Array:
        chosen = tuple(range(first.shape[0])) if rows is None else rows
        pair = [weight.values.take(chosen).load() for weight in (first, second)]
        return np.stack(pair, axis=2).reshape(len(chosen), 2 * first.shape[1], *first.shape[2:])

    mixed = Weight((first.shape[0], 2 * first.shape[1], *first.shape[2:]), first.dtype, read, first.shape[0])
    scales, zero_points = (
        None if mine is None or theirs is None else alternate(mine, theirs)
        for mine, theirs in zip(first._parts(), second._parts(), strict=True)
    )
    return dataclasses.replace(mixed, scales=scales, zero_points=zero_points)


def select(array: Array, rows: Rows | None) -> Array:
    """Rows of ``array``; a view where they are consecutive, so that a memory-mapped file is not copied."""
    if rows is None or array.ndim == 0:
        return array
    if rows and rows == tuple(range(rows[0], rows[0] + len(rows))):
        return array[rows[0] : rows[0] + len(rows)]
    return array[list(rows)]
