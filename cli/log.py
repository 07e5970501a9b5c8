"""`--log-file`: what a command was, what it said, how long it took and how it ended, with tracebacks of errors."""

import importlib.metadata
import logging
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cli.console import SAID
from moe_spec.errors import UserError

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def log_to(path: Path, arguments: Sequence[str]) -> None:
    """From now on add what is said to the file at ``path``; its first line is the command.

    Raises:
        UserError: it cannot be written.
    """
    try:
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(
            f"the log {path} cannot be written: {error.strerror}", hint="give another --log-file"
        ) from error
    handler.setFormatter(logging.Formatter(_FORMAT))
    SAID.addHandler(handler)
    SAID.info("moe-edge %s: moe-edge %s", importlib.metadata.version("moe-edge"), shlex.join(arguments))


@contextmanager
def ending_logged() -> Iterator[None]:
    """Say in the log how the block ended, and close it."""
    start, ended = time.monotonic(), "0"
    try:
        yield
    except SystemExit as leaving:
        ended = str(leaving.code or 0)
        raise
    except BaseException as error:
        ended = type(error).__name__
        raise
    finally:
        SAID.info("ended with %s after %.1f s", ended, time.monotonic() - start)
        for handler in [handler for handler in SAID.handlers if isinstance(handler, logging.FileHandler)]:
            SAID.removeHandler(handler)
            handler.close()
