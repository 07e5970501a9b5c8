"""The few calls of the CUDA driver that running an engine takes, through ctypes.

The driver library is on every GPU machine; the CUDA toolkit and its Python packages are not.

Executed by the tests: every call, into a library of the same names and types (read from ``cuda.h``) over the host's
memory. It has not run on a GPU yet.
"""

from __future__ import annotations  # Python 3.8: this file travels to devices, see runtime/bundle

import ctypes
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it waits for nothing on the default stream, so that it can be captured
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may call what they like
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class Driver:
    """GPU 0 with its primary context, which TensorRT shares. Buffers are freed at the end of the ``with`` block."""

    def __init__(self) -> None:
        """Load the driver.

        Raises:
            UserError: there is no driver, or no GPU.
        """
        try:
            self._cuda = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise UserError(f"there is no NVIDIA driver here: {error}", hint="install the driver of the GPU") from error
        self._call("cuInit", ctypes.c_uint(0))
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(0))
        self._buffers: dict[str, tuple[ctypes.c_uint64, int]] = {}
        self._context = ctypes.c_void_p()
        self.stream = ctypes.c_void_p()

    def compute_capability(self) -> str:
        """``major.minor`` of the GPU."""
        parts = []
        for attribute in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), self._device)
            parts.append(str(value.value))
        return ".".join(parts)

    def __enter__(self) -> Driver:
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self.make_current()
        self._call("cuStreamCreate", ctypes.byref(self.stream), ctypes.c_uint(_NON_BLOCKING))
        return self

    def make_current(self) -> None:
        """Let the calling thread use the GPU: a session may run in another thread than it was opened in."""
        self._call("cuCtxSetCurrent", self._context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pointer, _ in self._buffers.values():
            self._call("cuMemFree_v2", pointer)
        self._buffers.clear()
        self._call("cuStreamDestroy_v2", self.stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def buffer(self, name: str, size: int) -> int:
        """Address of a device buffer of at least ``size`` bytes, which belongs to ``name`` and is used again.

        It moves when it has to grow: whatever remembers addresses is out of date then.
        """
        pointer, capacity = self._buffers.get(name, (ctypes.c_uint64(), -1))
        if capacity < size:
            if capacity >= 0:
                self._call("cuMemFree_v2", pointer)
                del self._buffers[name]
            pointer = ctypes.c_uint64()
            self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
            self._buffers[name] = (pointer, size)
        return pointer.value

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device."""
        source = array.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), source, size, self.stream)

    def download(self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array from the device; its values are there once ``synchronize`` returned."""
        array = np.empty(shape, dtype)
        target = array.ctypes.data_as(ctypes.c_void_p)
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(address), size, self.stream)
        return array

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cuStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], bool]) -> ctypes.c_void_p | None:
        """What ``work`` puts on the stream, as a CUDA graph to `launch`; None if that cannot be captured."""
        self._call("cuStreamBeginCapture_v2", self.stream, ctypes.c_uint(_CAPTURE_THREAD_LOCAL))
        done, graph, ready = work(), ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self._call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
            if done:
                self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        except UserError:  # something in it cannot be captured; the stream goes on as before
            return None
        finally:
            if graph:
                self._call("cuGraphDestroy", graph)
        return ready if done else None

    def launch(self, graph: ctypes.c_void_p) -> None:
        """Put a captured graph on the stream."""
        self._call("cuGraphLaunch", graph, self.stream)

    def forget(self, graph: ctypes.c_void_p) -> None:
        """Free a captured graph."""
        self._call("cuGraphExecDestroy", graph)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._cuda, function)(*arguments)
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise UserError(f"the GPU driver refuses {function}: {reason} ({status})", hint="check the GPU with nvidia-smi")


def compute_capability_here() -> str | None:
    """``major.minor`` of this machine's GPU; None without one."""
    try:
        return Driver().compute_capability()
    except UserError:
        return None
