"""A GPU in the host's memory and an engine of a few lines, to run ``EngineSession`` where neither can be had.

The engine computes ``double = 2 x`` and ``positive``, the elements of ``x`` above zero: how many depends on the data.
While the driver captures, nothing is computed: what would be is kept with the addresses of that moment, and a buffer
that moved is overwritten. So a graph that should have been forgotten gives wrong results.
"""

import ctypes
import dataclasses
import enum
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_spec.manifest import Manifest, TensorSpec

FLOAT = np.dtype(np.float32)
KEPT = "past_key_values.0.key"
CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "IOutputAllocator")
"""Classes of the library that something here stands in for."""


class HostDriver:
    """``runtime.tensorrt.driver.Driver`` over memory of this process."""

    def __init__(self, can_capture: bool = True) -> None:
        self.stream = ctypes.c_void_p(7)
        self.capturing: list[Callable[[], None]] | None = None
        self.launched = self.freed = 0
        self.uploaded: list[np.ndarray[Any, Any]] = []
        self.closed = False
        self._can_capture = can_capture
        self._buffers: dict[str, np.ndarray[Any, Any]] = {}
        self._old: list[np.ndarray[Any, Any]] = []

    def __enter__(self) -> "HostDriver":
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def make_current(self) -> None: ...

    def synchronize(self) -> None: ...

    def buffer(self, name: str, size: int) -> int:
        held = self._buffers.get(name)
        if held is None or held.size < size:
            if held is not None:
                held[:] = 255
                self._old.append(held)  # still mapped, so that a stale address reads what is wrong
            held = self._buffers[name] = np.zeros(max(size, 1), np.uint8)
        return held.ctypes.data

    def upload(self, address: int, array: np.ndarray[Any, Any]) -> None:
        self.uploaded.append(array)
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        array = np.empty(shape, dtype)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array

    def capture(self, work: Callable[[], bool]) -> list[Callable[[], None]] | None:
        self.capturing = []
        done, captured, self.capturing = work(), self.capturing, None
        return captured if done and self._can_capture else None

    def launch(self, graph: list[Callable[[], None]]) -> None:
        self.launched += 1
        for call in graph:
            call()

    def forget(self, _graph: list[Callable[[], None]]) -> None:
        self.freed += 1


def read(address: int, count: int) -> np.ndarray[Any, Any]:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)) if count else np.empty(0, FLOAT)


class Context:
    """``IExecutionContext``."""

    def __init__(self, driver: HostDriver, fails: bool) -> None:
        self._driver, self._fails = driver, fails
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocator: Any = None
        self.profile = 0
        self.enqueued = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"] if name == "double" else (-1,)

    def set_output_allocator(self, _name: str, allocator: Any) -> bool:
        self.allocator = allocator
        return True

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self.profile = index
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        self.enqueued += 1
        source, result = self.addresses["x"], self.addresses["double"]
        count = int(np.prod(self.shapes["x"]))

        def compute() -> None:
            read(result, count)[:] = 2 * read(source, count)

        if self._driver.capturing is not None:
            self._driver.capturing.append(compute)
            return True
        compute()
        if self.allocator is not None:
            self._give_positive(read(source, count))
        return not self._fails

    def _give_positive(self, x: np.ndarray[Any, Any]) -> None:
        positive = x[x > 0]
        address = self.allocator.reallocate_output_async("positive", 0, positive.nbytes, 256, 7)
        read(address, positive.size)[:] = positive
        self.allocator.notify_shape("positive", positive.shape)


class DecoderContext(Context):
    """Keeps a number for every token, its id: logits are the sums of all that were seen up to each."""

    foresees = True
    """Whether it says how long the cache will be."""

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (batch, past, _), new = self.shapes[KEPT], self.shapes["input_ids"][1]
        if name == "logits":
            return (batch, new, 1)
        return (batch, past + new, 1) if self.foresees else (batch, -1, 1)

    def execute_async_v3(self, _stream: int) -> bool:
        self.enqueued += 1
        batch, new = self.shapes["input_ids"]
        ids = np.ctypeslib.as_array((ctypes.c_int64 * (batch * new)).from_address(self.addresses["input_ids"]))
        past = read(self.addresses[KEPT], int(np.prod(self.shapes[KEPT]))).reshape(self.shapes[KEPT])
        present = np.concatenate((past, ids.reshape(batch, new, 1).astype(FLOAT)), axis=1)
        if not self.foresees:
            size = present.nbytes
            self.addresses["present.0.key"] = self.allocator.reallocate_output("present.0.key", 0, size, 256)
            self.allocator.notify_shape("present.0.key", present.shape)
        read(self.addresses["present.0.key"], present.size)[:] = present.ravel()
        read(self.addresses["logits"], batch * new)[:] = present.cumsum(axis=1)[:, -new:].ravel()
        return not self._fails


class Cache:
    """``IRuntimeCache``."""

    def __init__(self) -> None:
        self.kernels = b""

    def deserialize(self, kernels: bytes) -> bool:
        self.kernels = kernels
        return True

    def serialize(self) -> bytes:
        return self.kernels or b"compiled"


class Config:
    """``IRuntimeConfig``."""

    cuda_graph_strategy: Any = None

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


@dataclasses.dataclass
class Engine:
    """``ICudaEngine``."""

    context: Context
    weight_streaming_budget_v2: int = 0
    config: Config | None = None

    def get_weight_streaming_automatic_budget(self) -> int:
        return 1234

    def create_runtime_config(self) -> Config:
        return Config()

    def create_execution_context(self, config: Config | None = None) -> Context:
        self.config = config
        return self.context


class OutputAllocator:
    """``IOutputAllocator``."""


class Logger:
    """``ILogger``."""

    class Severity(enum.Enum):
        """Of a message."""

        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


def _say(logger: Any, runtime: Any) -> Any:
    """What TensorRT says when it can neither read a plan nor run an engine."""
    logger.log(Logger.Severity.ERROR, "IRuntime::deserializeCudaEngine: Error Code 6: Version tag does not match")
    return runtime


def library(engine: Engine | None, rtx: bool = False) -> Any:
    """The Python module, as far as a session needs it. ``engine`` None: the plan cannot be read."""
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda _plan: engine, engine_host_code_allowed=False)
    trt = types.SimpleNamespace(
        ILogger=Logger,
        Runtime=lambda logger: _say(logger, runtime),
        IOutputAllocator=OutputAllocator,
        runtime=runtime,
    )
    if rtx:
        trt.CudaGraphStrategy = types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
    return trt


def manifest(*largest: int, positive: bool = False, **details: Any) -> Manifest:
    """Of the engine, with a profile of 1 to ``largest`` columns for each."""
    profiles = [{"x": {"min": [1, 1], "opt": [1, 1], "max": [4, most]}} for most in largest]
    outputs: tuple[TensorSpec, ...] = (TensorSpec("double", "float32", ("batch", "n")),)
    if positive:
        outputs = (*outputs, TensorSpec("positive", "float32", ("found",)))
    return Manifest(
        "engine", "", "", (), (TensorSpec("x", "float32", ("batch", "n")),), outputs,
        details={"target": "a100", "profiles": profiles, "compute_capabilities": ["8.0"], **details},
    )  # fmt: skip


def decoder(longest: int) -> Manifest:
    """Of the engine over a `DecoderContext`, for prompts and caches of that length."""
    ids, mask = ({"min": [1, 1], "opt": [1, 1], "max": [4, most]} for most in (longest, 2 * longest))
    past = {"min": [1, 0, 1], "opt": [1, 1, 1], "max": [4, longest, 1]}
    return Manifest(
        "engine", "", "", (),
        (
            TensorSpec("input_ids", "int64", ("batch", "new")),
            TensorSpec("attention_mask", "int64", ("batch", "past + new")),
            TensorSpec(KEPT, "float32", ("batch", "past", 1)),
        ),
        (
            TensorSpec("logits", "float32", ("batch", "new", 1)),
            TensorSpec("present.0.key", "float32", ("batch", "past + new", 1)),
        ),
        details={"profiles": [{"input_ids": ids, "attention_mask": mask, KEPT: past}], "compute_capabilities": ["8.0"]},
    )  # fmt: skip
