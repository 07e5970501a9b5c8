"""What opening a model takes, of time and memory: in a process of its own, where nothing else was ever allocated.

``python -m runtime.measuring.memory REQUEST`` is that process. Linux counts the peak; elsewhere nothing is reported.
"""

import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from moe_spec.decoder import has_cache
from moe_spec.errors import UserError
from moe_spec.manifest import TensorSpec
from moe_spec.runner import Arrays, Feeds, Kept
from runtime.backends import open_session
from runtime.execution import BY_DEFAULT, Execution
from runtime.inputs.random_feeds import RandomFeeds
from runtime.model_dir import home

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Timed(Protocol):
    """Of a session what is measured; leave the ``with`` block to free it."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes."""
        ...

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
        """Outputs by name."""
        ...

    def step(self, feeds: Feeds, kept: Kept | None = None) -> tuple[Arrays, Kept]:
        """A step of a decoder with a cache, as `runtime.backend.Session` has it; of others nobody asks."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclasses.dataclass(frozen=True)
class Alone:
    """One model in a process of its own.

    Attributes:
        load_ms: that opening it takes.
        peak_bytes: that opening it and running it once add to the peak of the process; None where that is not counted.
    """

    load_ms: float
    peak_bytes: int | None


def measure_alone(
    model: Path,
    leading: int,
    other: int,
    past: int,
    threads: int,
    *,
    module: str = "runtime.measuring.memory",
    **further: Any,
) -> Alone:
    """Open ``model`` in a new process, and run it once on random feeds.

    Args:
        model: engine directory, model directory or .onnx file.
        leading: length of leading dynamic axes.
        other: length of other dynamic axes.
        past: tokens in the cache of a decoder that has one.
        threads: that one operator may use; 0 for one a core.
        module: that is run with the request; it calls `measure_here`.
        **further: keys of the request that ``module`` asks for.

    Raises:
        UserError: the process failed.
    """
    draw = {"leading": leading, "other": other, "past": past, "seed": 0}
    request = json.dumps({"model": str(model.resolve()), "draw": draw, "threads": threads, **further})
    command = [sys.executable, "-P", "-m", module, request]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # noqa: S603 - our own module
    try:
        output, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        said = [line for line in errors.decode(errors="replace").splitlines() if not line.startswith("hint:")]
        reason = said[-1] if said else f"it ended with {process.returncode}"
        raise UserError(f"what {model} takes cannot be measured: {reason}", hint="free some memory and try again")
    return Alone(**json.loads(output))


def measure_here(request: Mapping[str, Any], opened: Callable[[], Timed], *, compiles: bool = False) -> str:
    """What a process that `measure_alone` started writes to stdout, `Alone` as JSON.

    Args:
        request: that it was started with.
        opened: opens what is measured.
        compiles: whether the first run belongs to the loading, because something is compiled in it.
    """
    try:
        _RESET.write_text("5")  # forget the peak of the imports
        before = _peak()
    except OSError:
        before = None
    started = time.perf_counter()
    with opened() as session:
        seconds = time.perf_counter() - started
        feeds = RandomFeeds.of(session.inputs, home(Path(request["model"]))).draw(**request["draw"])
        once = functools.partial(session.step if has_cache(session.inputs) else session.run, feeds)
        if compiles:
            started = time.perf_counter()
            once()
            seconds += time.perf_counter() - started
        once()
        return json.dumps(dataclasses.asdict(Alone(seconds * 1e3, None if before is None else _peak() - before)))


def _peak() -> int:
    """Peak of the resident memory. Not ``ru_maxrss``: a process inherits that from the one that started it."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _main(request: Mapping[str, Any]) -> str:
    execution = Execution.of_json(request["execution"]) if "execution" in request else BY_DEFAULT
    return measure_here(request, lambda: open_session(Path(request["model"]), request["threads"], execution))


if __name__ == "__main__":
    sys.stdout.write(_main(json.loads(sys.argv[1])))
