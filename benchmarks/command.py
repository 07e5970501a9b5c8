"""A command as a process of its own: how long it takes, and how much memory."""

import dataclasses
import os
import subprocess
import sys
import time


@dataclasses.dataclass(frozen=True)
class Usage:
    """Wall time until what was written is on disk, peak resident memory, and time of all cores together."""

    seconds: float
    peak_bytes: int
    cpu_seconds: float = 0.0


def moe_edge(*arguments: object) -> Usage:
    """``moe-edge ARGUMENTS``; see `python`."""
    return python("import cli.main; cli.main.main()", *arguments)


def python(code: str, *arguments: object) -> Usage:
    """``code`` with ``arguments`` in a Python of its own.

    A process starts with the peak of the one that started it: a benchmark should itself be small.

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    os.sync()
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)  # wait4 gives memory too, and Popen did not see it
    if child.returncode:
        raise RuntimeError(f"{code!r} with {arguments[0]} ended with exit code {child.returncode}")
    return Usage(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)
