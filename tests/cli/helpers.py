"""Run a verb as the command line does, in this process."""

import contextlib
import io
from pathlib import Path

import pytest

from cli.main import main


def invoke(verb: str, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``moe-edge VERB ARGUMENTS``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as leaving:
        main([verb, *map(str, arguments)], verbs=[verb])
    return int(leaving.value.code or 0), out.getvalue(), err.getvalue()


def leftovers(directory: Path) -> set[str]:
    """Names of what lies in ``directory``, hidden staging files too."""
    return {path.name for path in directory.iterdir()}
