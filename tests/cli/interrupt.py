"""Ctrl-C in the middle of long work. What does the work is imported here, so that no import is cut short."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import runtime.bench
import runtime.run
import runtime.verify  # noqa: F401


@contextlib.contextmanager
def ctrl_c(after: float = 0.5) -> Iterator[None]:
    """What runs in the block is interrupted after so many seconds; it must be work that takes far longer."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
