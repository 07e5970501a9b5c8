"""What goes on is shown on terminals, and only there."""

import logging

import pytest

from cli import console
from tests.cli.terminal import Terminal


@pytest.fixture
def terminal(monkeypatch):
    def made(*args, **options):
        shown = Terminal(*args, **options)
        monkeypatch.setattr(console, "err", shown.console)
        return shown

    return made


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_bar_says_how_much_is_done_and_how_long_it_will_take(terminal, width):
    shown = terminal(width, NO_COLOR="1")
    with console.progress("reading [/a path]", ticking=False) as tell:
        shown.now = 1.0
        for second in range(11):
            shown.now += 1
            tell("writing weights", second * 1000, 40_000)
        assert shown.line().startswith("writing weights ")
        assert shown.line().endswith(" 25 %, 0:00:30 left")
        assert len(shown.line()) == min(width - 2, 100)


def test_work_whose_end_cannot_be_told_says_how_long_it_has_gone_on(terminal):
    shown = terminal(NO_COLOR="1")
    with console.progress("reading [/a path]", ticking=False) as tell:
        tell("reading [/a path]", 3, 4)
        shown.now = 5.0
        tell("verifying [/a path]")
        shown.now = 7.0
        tell("verifying [/a path]")
        assert shown.line().startswith("verifying [/a path] ")
        assert shown.line().endswith(" 0:00:02")
    assert shown.line() == ""


def test_what_is_over_at_once_shows_nothing(terminal):
    shown = terminal()
    with console.progress("reading") as tell:
        tell("writing", 1, 2)
    assert "ing" not in shown.file.getvalue()


@pytest.mark.parametrize("options", [{"is_terminal": False}, {"TERM": "dumb"}], ids=["pipe", "dumb terminal"])
def test_who_cannot_move_a_cursor_gets_nothing(terminal, options):
    shown = terminal(**options)
    with console.progress("reading", ticking=False) as tell:
        shown.now = 1.0
        tell("writing", 1, 2)
    assert shown.file.getvalue() == ""


def test_without_colour_there_is_none(terminal):
    shown = terminal(NO_COLOR="1")
    with console.progress("reading", ticking=False) as tell:
        shown.now = 1.0
        tell("writing", 1, 2)
    assert "\x1b[3" not in shown.file.getvalue()


def test_whatever_ends_it_the_cursor_is_there_again(terminal):
    shown = terminal()
    with pytest.raises(KeyboardInterrupt), console.progress("reading", ticking=False):
        raise KeyboardInterrupt
    assert shown.file.getvalue().rindex("\x1b[?25h") > shown.file.getvalue().rindex("\x1b[?25l")


def test_the_log_has_every_phase_once(terminal, caplog):
    terminal(is_terminal=False)
    with caplog.at_level(logging.INFO, logger=console.SAID.name):
        console.SAID.addHandler(caplog.handler)
        with console.progress("reading") as tell:
            for done in range(3):
                tell("writing weights", done, 2)
            tell("comparing with torch")
        console.SAID.removeHandler(caplog.handler)
    assert caplog.messages == ["reading", "writing weights", "comparing with torch"]
