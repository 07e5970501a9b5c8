"""Cores: a benchmark whose threads wander between them measures the wandering."""

import contextlib
import os
from collections.abc import Iterator

from moe_spec.errors import UserError


def cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may use; empty where the system does not tell."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Within the block what is started may use so many cores only, one a thread, and so may this thread.

    Processes are started with it. Threads that run already stay where they may be.

    Args:
        threads: how many; 0 for all that there are, and nothing is changed then.

    Yields:
        The numbers of the cores; empty where none are chosen, because all are or the system cannot.

    Raises:
        UserError: this process may use fewer cores.
    """
    free = cores()
    if not threads or not free:
        yield ()
        return
    if len(free) < threads:
        raise UserError(
            f"{threads} threads cannot have a core each: {len(free)} may be used",
            hint=f"--threads {len(free)}, or --no-pin",
        )
    chosen = free[-threads:]  # systems like to do their own work on the first
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, free)
