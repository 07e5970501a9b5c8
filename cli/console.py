"""Where words go: results to stdout, progress and errors to stderr."""

import contextlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.markup import escape
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from cli.exits import READER_GONE
from moe_spec.errors import UserError, VerificationError
from moe_spec.progress import Progress


class _Console(Console):
    """Whose reader may go before the end."""

    def on_broken_pipe(self) -> None:
        leave_without_reader()


SAID = logging.getLogger("moe_edge_said")
"""What was said, for ``--log-file``; apart from the packages' own loggers, whose warnings are said."""
SAID.propagate = False
SAID.setLevel(logging.INFO)
SAID.addHandler(logging.NullHandler())

_PATIENCE = 0.5
"""Seconds that pass before a bar is shown."""
_NARROW, _WIDEST = 60, 100
"""Columns: below the first a line has words and no bar, and none is wider than the second."""

out = _Console(highlight=False)
err = _Console(stderr=True, highlight=False)


def accept_any_name() -> None:
    """Write what a path has that is no text, of which its bytes may be, with escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def result(summary: str, payload: Mapping[str, Any], as_json: bool) -> None:
    """What a command found: for people, or with ``--json`` one object for machines.

    Of several processes the first one speaks.
    """
    if not is_first():
        return
    SAID.info(summary)
    if as_json:
        piece(json.dumps(_finite(payload), indent=1, sort_keys=True, allow_nan=False) + "\n")
    else:
        out.print(summary, markup=False, soft_wrap=True)


def _finite(value: Any) -> Any:
    """``value`` with null for numbers that JSON does not have, which a model may well compute.

    >>> _finite({"loss": float("nan"), "scores": (1.5, float("-inf"))})
    {'loss': None, 'scores': [1.5, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


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
    with out.capture():  # a line that could not be written is still in rich's buffer, in front of the next
        pass


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


@contextmanager
def progress(what: str, *, ticking: bool = True) -> Iterator[Progress]:
    """Show on stderr what goes on within the block: first ``what``, then what the function it gives is told.

    A bar with the time that is left, or the time so far where the end cannot be told. It comes after half a second and
    goes away at the end. Only a terminal gets it; the log gets the name of every phase, at its beginning.

    Args:
        what: goes on until something else is told.
        ticking: whether the clock goes on between two calls, for which a thread wakes up ten times a second. Without it
            the bar is there at once, and changes when something is told.
    """
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=3)),  # [x] is no markup
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        _Time(table_column=Column(no_wrap=True)),
    ]
    if err.width < _NARROW:
        del columns[1]
    shown = err.is_interactive and is_first()
    with _Bar(
        *columns,
        console=err,
        auto_refresh=ticking,
        disable=not shown,
        expand=True,
        redirect_stdout=False,
        transient=True,
    ) as bar:

        def tell(what: str, done: int = 0, total: int | None = None, /) -> None:
            bar.tell(what, done, total)
            if not ticking:
                bar.refresh()

        tell(what)
        yield tell


class _Bar(Bars):
    """One bar, of the phase that was told last."""

    _since = 0.0

    def tell(self, what: str, done: int, total: int | None) -> None:
        """Another phase is another task: how quick the last one was says nothing of it."""
        with self._lock:
            if not self.tasks:
                self._since = self.get_time()
            if [what] != [task.description for task in self.tasks if task.completed <= done]:
                SAID.info(what)
                for task in self.tasks:
                    self.remove_task(task.id)
                self.add_task(what, total=None)
            self.update(self.tasks[0].id, completed=done, total=total)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Nothing for what is over at once; else a line on which a terminal has room left to echo ``^C``."""
        if not self._tasks or (self.live.auto_refresh and self.get_time() - self._since < _PATIENCE):
            return ()
        return (Constrain(table, min(self.console.width - 2, _WIDEST)) for table in super().get_renderables())


class _Time(ProgressColumn):
    """``40 %, 0:00:07 left`` where that is known, else ``0:00:12``, the time so far."""

    def render(self, task: Task) -> Text:
        """Of a phase."""
        if task.time_remaining is None or task.finished:
            return Text(f"{timedelta(seconds=int(task.elapsed or 0))}")
        return Text(f"{task.percentage:.0f} %, {timedelta(seconds=int(task.time_remaining))} left")


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
