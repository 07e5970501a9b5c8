"""The page of every verb and its options, told from the command line itself."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import typer.main

from benchmarks.markdown import table
from cli.exits import EXITS
from cli.help_page import argument, default, is_argument, usage
from cli.main import build_app

_EXAMPLE = re.compile(r"^Example: (.*)$", re.MULTILINE)


def page() -> str:
    """Every verb in the order of the way through the house."""
    app: Any = typer.main.get_command(build_app())  # typer's own copy of click, which has no types to import
    intro = (
        "Verbs read files and write files. `-o` never overwrites: what it names must not exist yet. Results go to "
        "stdout, progress and errors to stderr."
    )
    exits = table(("exit code", "means"), [(f"`{code}`", _cell(meaning)) for code, meaning in EXITS.items()], left=2)
    parts = ["# Commands", intro, exits, "## moe-edge", _options(app.params)]
    for name, command in app.commands.items():
        prose, *examples = _help(command.help)
        parts += [
            f"## {name}",
            f"`{usage(f'moe-edge {name}', command.params)}`",
            prose,
            _options(command.params),
            *examples,
        ]
    return "\n\n".join(parts) + "\n"


def _help(text: str) -> Iterator[str]:
    """What a verb's help says, then its examples as a block of commands."""
    prose = _EXAMPLE.sub("", text).strip()
    yield "`".join(_flags_as_code(part) if number % 2 == 0 else part for number, part in enumerate(prose.split("`")))
    examples = _EXAMPLE.findall(text)
    if examples:
        yield "\n".join(["```bash", *examples, "```"])


def _flags_as_code(text: str) -> str:
    return re.sub(r"(?<!\w)(--?[a-z][\w-]*)(?!\w)", r"`\1`", text)


def _options(parameters: list[Any]) -> str:
    """A table for each panel of the help; its options stand together."""
    panels = itertools.groupby(parameters, key=lambda one: getattr(one, "rich_help_panel", None))
    return "\n\n".join(itertools.chain.from_iterable(_panel(name, list(options)) for name, options in panels))


def _panel(name: str | None, parameters: list[Any]) -> Iterator[str]:
    if name is not None:
        yield f"**{_flags_as_code(name)}**"
    yield table(("", "what", "default"), [_row(one) for one in parameters], left=3)


def _row(one: Any) -> tuple[str, str, str]:
    if is_argument(one):
        return f"`{argument(one)}`", _cell(one.help), "needed" if one.required else ""
    names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
    value = default(one)
    return names, _cell(one.help), "needed" if one.required else value and f"`{value}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", r"\|").replace("\n", " ")
