"""The data file beside an ONNX file: what lies where is settled first, then the bytes are streamed to their places."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from graph_passes.weights.stored import ExternalValues, packed_bytes
from graph_passes.weights.weight import Array, Weight, bits_of
from moe_spec.external_data import INLINE_BYTES, aligned, lie_in
from moe_spec.progress import Progress, silent

CHUNK_BYTES = 1 << 18
"""Written at once: what stays in a core's cache between the copy out of the source and the copy into the file."""


class DataFile:
    """Weights that will lie in ``path``, which is not written before `write`, and not at all where it holds none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: list[tuple[int, Weight]] = []
        self._size = 0

    def hold(self, tensor: gs.Constant, weight: Weight) -> None:
        """Let the values of ``tensor`` lie at the end of the file; in the .onnx file where they are small."""
        if weight.nbytes < INLINE_BYTES:
            tensor._values = LazyValues(onnx.numpy_helper.from_array(np.array(weight.load(), order="C")))
        else:
            offset = aligned(self._size)
            tensor._values = ExternalValues(external(tensor.name, weight, self._path.name, offset), self._path.parent)
            self._parts.append((offset, weight))
            self._size = offset + weight.nbytes
        tensor.data_location = None

    def write(self, save_onnx: Callable[[], None], on_progress: Progress = silent) -> None:
        """Write all weights, while ``save_onnx`` writes the file that names them in a thread of its own.

        ``on_progress`` is told of the bytes.
        """
        if not self._parts:
            save_onnx()
            return
        with self._path.open("wb") as file, ThreadPoolExecutor(1) as beside:
            file.truncate(self._size)  # onnx.checker asks for the file
            saved = beside.submit(save_onnx)
            for offset, weight in self._parts:
                file.seek(offset)
                for piece in weight.pieces():
                    for chunk in _chunks(piece if bits_of(piece.dtype) >= 8 else packed_bytes(piece)):
                        chunk.tofile(file)
                assert file.tell() == offset + weight.nbytes, (file.tell(), offset, weight.nbytes)
                on_progress("writing weights", file.tell(), self._size)
            saved.result()


def _chunks(array: Array) -> Iterator[Array]:
    """The values in order, in contiguous arrays of at most `CHUNK_BYTES`."""
    if array.nbytes <= CHUNK_BYTES:
        yield np.ascontiguousarray(array)
        return
    rows = max(1, CHUNK_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield from _chunks(array[start] if rows == 1 else array[start : start + rows])


def external(name: str, weight: Weight, location: str, offset: int) -> onnx.TensorProto:
    """An initialiser whose values lie in the file ``location``."""
    proto = onnx.TensorProto(name=name, dims=weight.shape)
    proto.data_type = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
    lie_in(proto, location, offset, weight.nbytes)
    return proto
