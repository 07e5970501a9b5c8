"""One build in one process: ``python -m runtime.tensorrt.worker REQUEST.json``.

A fresh process, because a builder that was used before gives other bytes, and because TensorRT may crash.
stderr is the build log, stdout the progress. Facts or an error are written beside the request.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

from moe_spec.errors import UserError
from runtime.tensorrt.library import load_library
from runtime.tensorrt.network import build_engine
from runtime.tensorrt.request import ERROR, FACTS, BuildRequest, Step


def main(path: Path) -> int:
    """Build what the request at ``path`` asks for; 0 when it is done, 1 when an error was written."""
    request = BuildRequest.load(path)
    progress = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints belongs in the log

    def tell(step: Step) -> None:
        progress.write(step.line())
        progress.flush()

    try:
        facts = build_engine(load_library(request.backend), request, sys.stderr, tell)
    except UserError as error:
        return _fail(path, error)
    except OSError as error:
        what = f"the disk of {request.engine.parent} cannot hold the engine: {error.strerror}"
        return _fail(path, UserError(what, hint="make room there, or give another -o"))
    path.with_name(FACTS).write_text(json.dumps(dataclasses.asdict(facts)), encoding="utf-8")
    return 0


def _fail(path: Path, error: UserError) -> int:
    path.with_name(ERROR).write_text(json.dumps({"what": error.what, "hint": error.hint}), encoding="utf-8")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
