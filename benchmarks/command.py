"""A command as a process of its own: how long it takes, and how much memory."""

import dataclasses
import json
import subprocess
import sys

_MEASURE = """
import json, os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
os.sync()
seconds = time.perf_counter() - started
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime]))
"""
"""A process begins with the peak of the one that starts it, so a small one does. The peak is its children's too."""


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

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    said = subprocess.run([sys.executable, "-S", "-c", _MEASURE, *command], stdout=subprocess.PIPE, check=True).stdout
    exit_code, *usage = json.loads(said)
    if exit_code:
        raise RuntimeError(f"{code!r} with {arguments[0]} ended with exit code {exit_code}")
    return Usage(*usage)
