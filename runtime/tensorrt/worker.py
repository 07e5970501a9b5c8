"""One build in one process: ``python -m runtime.tensorrt.worker REQUEST.json``.

A fresh process, because a builder that was used before gives other bytes, and because TensorRT may crash.
stderr is the build log, stdout the progress. Facts or an error are written beside the request. stdin is open for as
long as whoever asked for the build lives: when it is closed, the build ends.
"""

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path

from moe_spec.errors import UserError
from runtime.tensorrt.library import load_library
from runtime.tensorrt.network import build_engine
from runtime.tensorrt.request import ERROR, FACTS, BuildRequest, Step


def main(path: Path) -> int:
    """Build what the request at ``path`` asks for; 0 when it is done, 1 when an error was written."""
    threading.Thread(target=_end_with_caller, daemon=True).start()
    request = BuildRequest.load(path)
    progress = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints belongs in the log

    def tell(step: Step) -> None:
        progress.write(step.line())
        progress.flush()

    try:
        facts = build_engine(load_library(request.backend), request, sys.stderr, tell)
    except UserError as error:
        return _fail(path, what=error.what, hint=error.hint)
    except OSError as error:
        return _fail(path, errno=error.errno, strerror=error.strerror)
    path.with_name(FACTS).write_text(json.dumps(dataclasses.asdict(facts)), encoding="utf-8")
    return 0


def _end_with_caller() -> None:
    os.read(sys.stdin.fileno(), 1)  # nobody writes: it returns when nobody can
    os._exit(1)


def _fail(path: Path, **said: object) -> int:
    path.with_name(ERROR).write_text(json.dumps(said), encoding="utf-8")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
