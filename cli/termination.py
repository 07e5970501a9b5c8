"""SIGTERM, by which `kill`, `docker stop` and batch systems end a process: a command ends in order, as with ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cli.exits import INTERRUPTED, TERMINATED


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within the block SIGTERM interrupts, and what ends because of it ends with `TERMINATED`.

    Python would die of it where it stands: staging directories would stay, and the cursor hidden. Where somebody else
    takes the signal, as a program does that calls `cli.main.main`, it is left to them.
    """
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - what Python calls
        came.append(number)
        raise KeyboardInterrupt

    is_ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if is_ours:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except SystemExit as leaving:
        if came and leaving.code == INTERRUPTED:
            raise SystemExit(TERMINATED) from leaving
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
