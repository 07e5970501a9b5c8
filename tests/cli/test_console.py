"""What goes on is shown on terminals, and only there."""

import io

import pytest
from rich.console import Console

from cli import console


@pytest.fixture
def terminal(monkeypatch):
    def made(is_terminal):
        monkeypatch.setattr(console, "err", Console(file=io.StringIO(), force_terminal=is_terminal, width=80))
        return console.err.file

    return made


def test_a_bar_says_how_much_is_done_and_how_long_it_will_take(terminal):
    shown = terminal(True)
    with console.progress() as bar:
        task = bar.add_task("reading [/a path]", total=4)
        bar.update(task, completed=2)
        bar.refresh()
        assert "reading [/a path]" in shown.getvalue()
        assert "2/4" in shown.getvalue()
        assert ":--" in shown.getvalue()


def test_work_whose_end_cannot_be_told_says_how_long_it_has_gone_on(terminal):
    shown = terminal(True)
    with console.status("verifying [/a path]"):
        pass
    assert "verifying [/a path]" in shown.getvalue()
    assert "0:00:00" in shown.getvalue()


def test_a_pipe_gets_neither(terminal):
    shown = terminal(False)
    with console.progress() as bar:
        bar.add_task("reading", total=4)
    with console.status("verifying"):
        pass
    assert shown.getvalue() == ""
