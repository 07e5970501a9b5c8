"""How a page of ``--help`` looks: usage, prose, examples, then a panel for each group of options or verbs.

Typer's own page has six columns, of which a narrow terminal cuts the names. Here names stand in one column, and on
lines of their own where that would leave too little for what is said of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cli import console

EXAMPLE = "Example: "
NARROW = 60
"""Columns of a terminal below which names stand on lines of their own."""

_LONG = 28
_FLAG = r"(?<![\w-])--?[a-zA-Z][\w-]*"

Row = tuple[str, Text]


def show(how: str, text: str, panels: Mapping[str, Sequence[Row]]) -> None:
    """Print a page.

    Args:
        how: what is typed, as `usage` tells it.
        text: paragraphs, each on one line, and examples, each on one.
        panels: names, and what is said of each, by title.
    """
    console.out.print(Padding(_prose(f"Usage: {how}", "bold"), (1, 1, 0, 1)))
    for paragraph in text.split("\n\n"):
        console.out.print(Padding(Group(*map(_line, paragraph.split("\n"))), (1, 1, 0, 1)))
    console.out.print()
    for title, rows in panels.items():
        console.out.print(Panel(_laid(rows), title=title, title_align="left", border_style="dim", box=box.ROUNDED))


def usage(path: str, parameters: Iterable[Any]) -> str:
    """How a command is called, with what it cannot do without.

    >>> usage("moe-edge demo", [])
    'moe-edge demo [OPTIONS]'
    """
    needed = [one for one in parameters if one.required]
    named = [
        f"{max(one.opts, key=len)} {one.metavar or one.display_type(None)}" for one in needed if not is_argument(one)
    ]
    return " ".join([path, *map(argument, filter(is_argument, parameters)), *named, "[OPTIONS]"])


def is_argument(parameter: Any) -> bool:
    """Whether it is given by its place, without a name."""
    return bool(parameter.param_type_name == "argument")


def argument(parameter: Any) -> str:
    """What an argument is called: MODEL, MODELS... or [MODEL]."""
    name = f"{parameter.metavar}{'...' if parameter.nargs == -1 else ''}"
    return name if parameter.required else f"[{name}]"


def default(parameter: Any) -> str:
    """What it is where it is not given, as a reader says it; nothing where its help says that."""
    value = parameter.default
    if value is None or value is False or value in ([], ()):
        return ""
    return "on" if value is True else str(value)


def row(parameter: Any) -> Row:
    """The names of an option or argument, and what is said of it."""
    said, notes = _prose(parameter.help), limits(parameter)
    if parameter.required:
        notes.insert(0, "needed")
    elif default(parameter):
        notes.insert(0, f"default: {default(parameter)}")
    if notes:
        said.append(f" [{', '.join(notes)}]", "dim")
    if is_argument(parameter):
        return argument(parameter), said
    names = [*sorted(parameter.opts, key=lambda name: name.startswith("--")), *parameter.secondary_opts]
    joined = ", ".join(names)
    value = parameter.metavar or parameter.display_type(None)
    return f"{joined if len(joined) <= _LONG else joined.replace(' ', chr(10))} {value}".rstrip(), said


def limits(parameter: Any) -> list[str]:
    """Between which numbers a value may lie, if it says."""
    if parameter.min is None:
        return []
    return [f"{parameter.min} or more" if parameter.max is None else f"{parameter.min} to {parameter.max}"]


def verb_row(name: str, command: Any) -> Row:
    """A verb and what it does: the first paragraph of its help."""
    return name, _prose(command.help.split("\n\n")[0])


def _laid(rows: Sequence[Row]) -> RenderableType:
    if console.out.width < NARROW:
        return Group(*_stacked(rows))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold cyan")
    table.add_column()
    for name, said in rows:
        table.add_row(name, said)
    return table


def _stacked(rows: Sequence[Row]) -> Iterator[RenderableType]:
    for name, said in rows:
        yield Text(name, "bold cyan")
        yield Padding(said, (0, 0, 0, 2))


def _line(text: str) -> Text:
    return Text.assemble((EXAMPLE, "dim"), text.removeprefix(EXAMPLE)) if text.startswith(EXAMPLE) else _prose(text)


def _prose(text: str, style: str = "") -> Text:
    words = Text(text, style)
    words.highlight_regex(_FLAG, "cyan")
    return words
