"""Weights that stay on disk until they are written: what graphsurgeon cannot hold is dealt with here.

graphsurgeon casts bf16, int4 and fp8 when it looks at values, and an initialiser may be larger than memory. A
``Weight`` knows where its bytes are and what is to be done with them; only ``load`` reads, one tensor at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.external_data_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from moe_spec.errors import UserError
from moe_spec.files import inside

Array = npt.NDArray[Any]

_MEND = "copy or export the model again; its weights lie beside the .onnx file"


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor that is read on demand.

    Attributes:
        shape: of what ``load`` gives.
        dtype: numpy dtype of what ``load`` gives (``ml_dtypes.bfloat16`` for bf16).
        source: reads the stored tensor, memory-mapped where it lies in a file of its own.
        rows: which rows of axis 0 are taken, None for all.
        transform: what is done with the rows taken; keeps axis 0 where ``take`` is to follow.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    source: Callable[[], Array]
    rows: tuple[int, ...] | None = None
    transform: Callable[[Array], Array] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what ``load`` gives."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def take(self, rows: Sequence[int]) -> "Weight":
        """The rows ``rows`` of axis 0; only they are read."""
        chosen = tuple(rows) if self.rows is None else tuple(self.rows[row] for row in rows)
        return dataclasses.replace(self, shape=(len(chosen), *self.shape[1:]), rows=chosen)

    def map(self, shape: tuple[int, ...], transform: Callable[[Array], Array]) -> "Weight":
        """``transform`` of this weight, of shape ``shape``, once it is read."""
        before = self.transform
        after = transform if before is None else lambda array: transform(before(array))
        return dataclasses.replace(self, shape=shape, transform=after)

    def load(self) -> Array:
        """Read the rows taken and transform them."""
        array = self.source()
        if self.rows is not None:
            array = array[list(self.rows)]
        if self.transform is not None:
            array = self.transform(array)
        assert array.shape == self.shape, (array.shape, self.shape)
        return array


def from_array(array: Array) -> Weight:
    """A weight that is in memory already."""
    return Weight(array.shape, array.dtype, lambda: array)


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
    proto: onnx.TensorProto = values.tensor
    shape, dtype = tuple(proto.dims), dtype_of(proto)
    if not onnx.external_data_helper.uses_external_data(proto):
        _check_inline(proto, shape, dtype)
        return Weight(shape, dtype, lambda: onnx.numpy_helper.to_array(proto))
    info = onnx.external_data_helper.ExternalDataInfo(proto)
    path = inside(directory, info.location, directory / "model.onnx")
    _check_extent(proto.name, path, info.offset or 0, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
    offset = info.offset or 0
    return Weight(shape, dtype, lambda: np.memmap(path, dtype, mode="r", offset=offset, shape=shape))


def dtype_of(proto: onnx.TensorProto) -> np.dtype[Any]:
    """Numpy's dtype of a stored tensor.

    Raises:
        UserError: ONNX knows no such type.
    """
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    except KeyError as error:
        raise UserError(f"weight {proto.name} has the unknown data type {proto.data_type}", hint=_MEND) from error


def _check_inline(proto: onnx.TensorProto, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if proto.HasField("raw_data") and len(proto.raw_data) != wanted:
        raise UserError(
            f"weight {proto.name} holds {len(proto.raw_data)} bytes, {dtype.name}{list(shape)} needs {wanted}",
            hint=_MEND,
        )


def _check_extent(name: str, path: Path, offset: int, length: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise UserError(f"{path} does not exist, but weight {name} lies in it", hint=_MEND)
    if offset + length > size:
        raise UserError(
            f"{path} has {size} bytes, but weight {name} needs bytes {offset} to {offset + length}: the file is cut",
            hint=_MEND,
        )


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


def constant(name: str, weight: Weight) -> gs.Constant:
    """A graph constant over ``weight``."""
    return gs.Constant(name, LazyWeight(weight))
