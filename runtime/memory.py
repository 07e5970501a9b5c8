"""How much memory a model takes: measured in a process of its own, where nothing else was ever allocated.

``python -m runtime.memory REQUEST`` is that process. Linux counts the peak; elsewhere nothing is reported.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_spec.errors import UserError
from runtime.backends import open_session
from runtime.feeds import RandomFeeds

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_memory(model: Path, leading: int, other: int, past: int, threads: int) -> int | None:
    """Bytes that opening ``model`` and running it once add to the peak of a process; None where that is not counted.

    Args:
        model: engine directory, model directory or .onnx file.
        leading: length of leading dynamic axes.
        other: length of other dynamic axes.
        past: tokens in the cache of a decoder that has one.
        threads: that one operator may use; 0 for one a core.

    Raises:
        UserError: the process failed.
    """
    draw = {"leading": leading, "other": other, "past": past, "seed": 0}
    request = json.dumps({"model": str(model.resolve()), "draw": draw, "threads": threads})
    command = [sys.executable, "-P", "-m", "runtime.memory", request]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # noqa: S603 - our own module
    try:
        output, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        said = [line for line in errors.decode(errors="replace").splitlines() if not line.startswith("hint:")]
        reason = said[-1] if said else f"it ended with {process.returncode}"
        raise UserError(f"memory of {model} cannot be measured: {reason}", hint="free some memory and try again")
    measured: int | None = json.loads(output)
    return measured


def _measure(request: dict[str, Any]) -> int | None:
    try:
        _RESET.write_text("5")  # forget the peak of the imports
    except OSError:
        return None
    before = _peak()
    with open_session(Path(request["model"]), request["threads"]) as session:
        feeds = RandomFeeds.of(session.inputs, Path(request["model"]))
        session.run(feeds.draw(**request["draw"]))
        return _peak() - before


def _peak() -> int:
    """Peak of the resident memory. Not ``ru_maxrss``: a process inherits that from the one that started it."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(json.loads(sys.argv[1]))))
