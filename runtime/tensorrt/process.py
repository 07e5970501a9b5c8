"""Runs a build in a process of its own, and turns whatever becomes of it into facts or an error."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.progress import Progress, silent
from runtime.tensorrt.request import ERROR, FACTS, BuildRequest, NetworkFacts, Step

_LAST_LINES = 3


def build_in_fresh_process(request: BuildRequest, log: Path, on_progress: Progress = silent) -> NetworkFacts:
    """Build ``request.engine``; what TensorRT says goes to ``log``. The process dies with this one, killed or not.

    Raises:
        OSError: the disk cannot hold the engine.
        UserError: TensorRT refuses the model, or crashes.
    """
    with tempfile.TemporaryDirectory(dir=log.parent) as scratch, log.open("wb") as output:
        path = Path(scratch) / "request.json"
        request.save(path)
        # -P: a `runtime` or `numpy` folder in the current directory must not be imported
        command = [sys.executable, "-P", "-m", "runtime.tensorrt.worker", str(path)]
        process = subprocess.Popen(  # noqa: S603 - our own worker
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True, encoding="utf-8"
        )
        try:
            _follow(process, on_progress)
            status = process.wait()
        finally:
            process.kill()  # no effect on a process that has ended
            process.communicate()
        if status == 0:
            return NetworkFacts(**json.loads(path.with_name(FACTS).read_text(encoding="utf-8")))
        if path.with_name(ERROR).is_file():
            said = json.loads(path.with_name(ERROR).read_text(encoding="utf-8"))
            raise OSError(said["errno"], said["strerror"]) if "errno" in said else UserError(**said)
    raise UserError(
        f"{request.backend} ended with {_describe(status)} while it built {request.onnx.name}; "
        f"it last said: {_last_words(log)}",
        hint="free some memory and try again; if it crashes again, report it to NVIDIA with the log",
    )


def _follow(process: subprocess.Popen[str], on_progress: Progress) -> None:
    """Pass on what the process says of its progress, until it says no more."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.endswith("\n"):  # a process that was killed may leave half a line
            step = Step.parse(line)
            on_progress(step.phase, step.done, step.total)


def _describe(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(lines[-_LAST_LINES:]) or "nothing"
