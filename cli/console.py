"""Where words go: results to stdout, progress and errors to stderr."""

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moe_spec.errors import UserError, VerificationError

READER_GONE = 141
"""What a shell reports of a tool that SIGPIPE ended: 128 and the signal's number."""


class _Console(Console):
    """Whose reader may go before the end."""

    def on_broken_pipe(self) -> None:
        leave_without_reader()


SAID = logging.getLogger("moe_edge_said")
"""What was said, for ``--log-file``; apart from the packages' own loggers, whose warnings are said."""
SAID.propagate = False
SAID.setLevel(logging.INFO)
SAID.addHandler(logging.NullHandler())

_WHAT = TextColumn("{task.description}", markup=False)  # square brackets of a path are no markup

out = _Console(highlight=False)
err = _Console(stderr=True, highlight=False)


def result(summary: str, payload: Mapping[str, Any], as_json: bool) -> None:
    """What a command found: for people, or with ``--json`` one object for machines.

    Of several processes the first one speaks.
    """
    if not is_first():
        return
    SAID.info(summary)
    if as_json:
        piece(json.dumps(payload, indent=1, sort_keys=True) + "\n")
    else:
        out.print(summary, markup=False, soft_wrap=True)


def piece(text: str) -> None:
    """Part of a longer text, as soon as it is known."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        leave_without_reader()


def leave_without_reader() -> NoReturn:
    """End in order when nobody reads what is written, as behind `| head -1`: no traceback, and all that is open closed.

    Raises:
        SystemExit: always, with `READER_GONE`.
    """
    drop_output()
    raise SystemExit(READER_GONE)


def drop_output() -> None:
    """Let what is left for stdout go nowhere: Python writes it when it ends, and would fail once more."""
    with contextlib.suppress(io.UnsupportedOperation):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warning(record.getMessage())


@contextmanager
def showing_warnings() -> Iterator[None]:
    """Within the block, show what our packages warn of, which they do by Python's logging."""
    logger, shown = logging.getLogger("moe_edge"), _Warnings(logging.WARNING)
    logger.addHandler(shown)
    try:
        yield
    finally:
        logger.removeHandler(shown)


def is_first() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def error(failure: UserError) -> None:
    """``error:`` and ``hint:``, one line each."""
    SAID.error(str(failure), exc_info=failure)
    err.print(f"[bold red]error:[/] {plain(failure.what)}", soft_wrap=True)
    err.print(f"[bold cyan]hint:[/] {plain(failure.hint)}", soft_wrap=True)


def warning(what: str) -> None:
    """What a user should stop at. Of several processes the first one says it."""
    if is_first():
        SAID.warning(what)
        err.print(f"[bold yellow]warning:[/] {plain(what)}", soft_wrap=True)


def failure(what: VerificationError) -> None:
    """What was not proven."""
    SAID.error(str(what), exc_info=what)
    err.print(f"[bold red]verification failed:[/] {plain(str(what))}", soft_wrap=True)


def plain(text: str) -> str:
    """``text`` for rich to show as it is: square brackets are no markup."""
    return escape(text)


def progress() -> Progress:
    """A bar on stderr with the time that is left; it goes away when the work is done."""
    return _progress(_WHAT, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


@contextmanager
def status(what: str) -> Iterator[None]:
    """``what`` on stderr and how long it has gone on, for work whose end cannot be told."""
    with _progress(SpinnerColumn(), _WHAT, TimeElapsedColumn()) as bar:
        bar.add_task(what, total=None)
        yield


def _progress(*columns: ProgressColumn) -> Progress:
    return Progress(*columns, console=err, transient=True, disable=not (err.is_terminal and is_first()))


def step(what: str) -> None:
    """One line on stderr for each step of a longer journey."""
    SAID.info(what)
    err.print(f"[dim]·[/] {plain(what)}", soft_wrap=True)


def mebibytes(count: int | None) -> str:
    """Bytes of memory in MiB, a dash where they are not known.

    >>> mebibytes(3 << 19), mebibytes(None)
    ('1.5', '-')
    """
    return "-" if count is None else f"{count / (1 << 20):.1f}"
