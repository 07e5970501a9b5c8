"""Run a verb as the command line does, in this process."""

import contextlib
import io
from pathlib import Path

import pytest

from cli.main import main

INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""First line of a process that a test interrupts: what a shell runs in the background ignores SIGINT, and so would its
children."""


def invoke(verb: str, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``moe-edge VERB ARGUMENTS``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as leaving:
        main([verb, *map(str, arguments)], verbs=[verb])
    return int(leaving.value.code or 0), out.getvalue(), err.getvalue()


def done(verb: str, *arguments: object) -> str:
    """Stdout of ``moe-edge VERB ARGUMENTS``, which succeeds without a word on stderr."""
    code, stdout, stderr = invoke(verb, *arguments)
    assert (code, stderr) == (0, "")
    return stdout


def leftovers(directory: Path) -> set[str]:
    """Names of what lies in ``directory``, hidden staging files too."""
    return {path.name for path in directory.iterdir()}
