"""Help that wraps, on wide and narrow terminals; colour where a terminal is and nowhere else."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cli import console
from cli.exits import READER_GONE
from cli.help import PANELS, help_text
from cli.help_page import EXAMPLE
from cli.main import GROUPS, VERBS, build_app, main
from tests.cli.helpers import invoke

MANY = 8
COMMAND: Any = typer.main.get_command(build_app())
ANSI = "\x1b["


def options_of(verb):
    return {parameter.name: parameter for parameter in COMMAND.commands[verb].params if parameter.opts[0][0] == "-"}


@pytest.fixture(params=[40, 80, 120])
def width(request, monkeypatch):
    monkeypatch.setattr(console, "out", type(console.out)(width=request.param, highlight=False))
    return request.param


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_fits_the_terminal(verb, width):
    code, out, err = invoke(verb, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= width
    assert ANSI not in out
    for parameter in options_of(verb).values():
        assert [name for name in (*parameter.opts, *parameter.secondary_opts) if name not in out] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_examples_of_itself_on_lines_of_their_own(verb):
    lines = COMMAND.commands[verb].help.splitlines()
    examples = [line for line in lines if line.startswith(EXAMPLE)]
    assert examples
    assert all(f"moe-edge {verb}" in line for line in examples)
    assert "".join(lines).count(EXAMPLE) == len(examples)


@pytest.mark.parametrize("verb", VERBS)
def test_paragraphs_are_lines(verb):
    """A line break in a docstring is none in the help."""
    paragraphs = COMMAND.commands[verb].help.split("\n\n")
    assert all("\n" not in paragraph or paragraph.startswith(EXAMPLE) for paragraph in paragraphs)


@pytest.mark.parametrize("verb", VERBS)
def test_many_options_are_in_panels(verb):
    shown = [options_of(verb)[name].rich_help_panel for name in options_of(verb)]
    assert max(map(shown.count, shown)) <= MANY + 1


def test_panels_name_options_that_there_are():
    for verb, panels in PANELS.items():
        named = [name for names in panels.values() for name in names]
        assert len(named) == len(set(named)), verb
    anywhere = {name for verb in VERBS for name in options_of(verb)}
    assert {name for panels in PANELS.values() for names in panels.values() for name in names} <= anywhere


def test_the_first_help_shows_every_verb_in_its_group(width, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    order = [re.escape(word) for group, verbs in GROUPS.items() for word in (f"─ {group} ─", *verbs)]
    assert re.search(".*".join(order), out, re.DOTALL)
    assert max(map(len, out.splitlines())) <= width


def test_an_example_is_no_part_of_a_paragraph():
    assert help_text("One\ntwo.\n\nExample: a\nExample: b") == "One two.\n\nExample: a\nExample: b"


def colours(**environment):
    """What --help prints with these variables: whether it has colours."""
    command = [str(Path(sys.executable).parent / "moe-edge"), "--help"]
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    found = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    return ANSI in found.stdout


def test_colours_are_for_those_who_ask():
    assert not colours()
    assert colours(FORCE_COLOR="1", TERM="xterm")
    assert not colours(NO_COLOR="1", TERM="xterm")


@pytest.mark.parametrize("given", [["--help"], ["plan", "--help"], ["--version"], ["--show-completion"]])
def test_a_reader_that_goes_ends_help_as_it_ends_any_command(given, capfd, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))  # not every run has one above it
    source, sink = os.pipe()
    os.close(source)
    with os.fdopen(sink, "w") as stdout, contextlib.redirect_stdout(stdout), pytest.raises(SystemExit) as leaving:
        main(given)
    assert (leaving.value.code, capfd.readouterr()) == (READER_GONE, ("", ""))
