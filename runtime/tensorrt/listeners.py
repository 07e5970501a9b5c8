"""What TensorRT calls while it builds or runs: a logger, a progress monitor, a writer, an allocator of outputs.

Their base classes come with it.
"""

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TextIO

from runtime.tensorrt.driver import Driver
from runtime.tensorrt.request import Step

_MEMORY = {
    "activations": re.compile(r"Total Activation Memory: (\d+)"),
    "weights": re.compile(r"Total Weights Memory: (\d+)"),
    "scratch": re.compile(r"Max Scratch Memory: (\d+)"),
}
"""What TensorRT says of the engine's memory, in bytes, once for each engine in the plan."""

_SECONDS_BETWEEN = 0.1


def make_logger(trt: Any, log: TextIO | None = None) -> Any:
    """A logger that writes to ``log``, with the attributes ``errors`` (messages) and ``memory`` (largest of each)."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class is known once it is imported
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.memory: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.Severity.VERBOSE:
                return
            is_error = severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)
            if is_error:
                self.errors.append(message)
            if log is not None:
                log.write(f"[{severity.name}] {message}\n")
                if is_error:
                    log.flush()
            for what, pattern in _MEMORY.items():
                if found := pattern.search(message):
                    self.memory[what] = max(self.memory.get(what, 0), int(found[1]))

    return Logger()


def make_monitor(trt: Any, tell: Callable[[Step], None]) -> Any:
    """A progress monitor that tells of every phase, and of its steps ten times a second at most.

    Phases lie within each other: when one ends, the one around it is told again, for that goes on. TensorRT calls it
    from several threads.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # likewise
        def __init__(self) -> None:
            super().__init__()
            self._lock = threading.Lock()
            self._steps: dict[str, Step] = {}
            self._around: dict[str, str | None] = {}
            self._told = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._around[phase] = parent
                self._steps[phase] = Step(phase, 0, steps)
                tell(self._steps[phase])

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                self._steps[phase] = dataclasses.replace(self._steps[phase], done=step + 1)
                if time.monotonic() - self._told >= _SECONDS_BETWEEN:
                    self._told = time.monotonic()
                    tell(self._steps[phase])
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                ended, around = self._steps.pop(phase), self._around.pop(phase)
                tell(dataclasses.replace(ended, done=ended.total))
                if around in self._steps:
                    tell(self._steps[around])

    return Monitor()


def make_writer(trt: Any, file: BinaryIO) -> Any:
    """Writes the engine to ``file``. An error ends the build, and is kept in ``failure``: C++ takes no exceptions."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]  # likewise
        def __init__(self) -> None:
            super().__init__()
            self.failure: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.failure = error
                return 0

    return Writer()


def make_allocator(trt: Any, driver: Driver) -> Any:
    """Gives outputs whose shape depends on the data their buffers while the engine runs; ``shapes`` has what came."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]  # likewise
        def __init__(self) -> None:
            super().__init__()
            self.shapes: dict[str, tuple[int, ...]] = {}

        def reallocate_output(self, name: str, _memory: int, size: int, _alignment: int) -> int:
            return driver.buffer(name, size)

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, _stream: int) -> int:
            return self.reallocate_output(name, memory, size, alignment)

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shapes[name] = tuple(shape)

    return Allocator()
