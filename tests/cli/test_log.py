"""`--log-file` keeps what was run, what it said and how it ended."""

import importlib.metadata
import re

import pytest

from cli.main import main
from tests.cli.helpers import leftovers


def ran(*arguments):
    with pytest.raises(SystemExit) as leaving:
        main(list(map(str, arguments)), verbs=["targets", "inspect"])
    return leaving.value.code or 0


def lines_of(path):
    """Without the time."""
    return [re.sub(r"^[-\d]{10} [:,\d]{12} ", "", line) for line in path.read_text().splitlines()]


def test_a_log_has_the_command_the_result_and_the_end(tmp_path, capsys):
    log = tmp_path / "run.log"
    assert ran("--log-file", log, "targets", "--target", "rtx-ada") == 0
    command, result, end = lines_of(log)
    assert command.partition(": ")[::2] == (
        f"INFO moe-edge {importlib.metadata.version('moe-edge')}",
        f"moe-edge --log-file {log} targets --target rtx-ada",
    )
    assert result == "INFO 1 targets of graphs, 0 of checkpoints (TensorRT-Edge-LLM's plugins)"
    assert re.fullmatch(r"INFO ended with 0 after [\d.]+ s", end)


def test_an_error_has_its_traceback_in_the_log_and_the_next_command_is_added(tmp_path, capsys):
    log = tmp_path / "run.log"
    assert ran("--log-file", log, "targets", "--target", "rtx-adda") == 1
    assert "Traceback" not in capsys.readouterr().err
    assert "ERROR unknown target 'rtx-adda'" in lines_of(log)
    assert "Traceback (most recent call last):" in lines_of(log)
    assert lines_of(log)[-1].startswith("INFO ended with 1 after")
    before = len(lines_of(log))
    assert ran("--log-file", log, "targets", "--target", "rtx-ada") == 0
    assert len(lines_of(log)) == before + 3


def test_without_the_option_there_is_no_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ran("targets") == 0
    assert leftovers(tmp_path) == set()


def test_a_log_that_cannot_be_written_is_an_error(tmp_path, capsys):
    assert ran("--log-file", tmp_path / "none" / "run.log", "targets") == 1
    assert capsys.readouterr().err == (
        f"error: the log {tmp_path}/none/run.log cannot be written: No such file or directory\n"
        "hint: give another --log-file\n"
    )
