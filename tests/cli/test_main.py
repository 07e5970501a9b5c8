"""What every verb shares: exit codes, errors on stderr, missing packages."""

import contextlib
import errno
import importlib
import io
import signal

import pytest
import typer

from cli import console, exits
from cli.main import main
from moe_spec.errors import UserError, VerificationError
from tests.cli.helpers import invoke


@pytest.fixture
def failing(monkeypatch):
    """A verb that raises what it is told to, or gets such a signal."""

    def fail_with(error: BaseException | signal.Signals) -> tuple[int, str, str]:
        def inspect() -> None:
            if isinstance(error, BaseException):
                raise error
            signal.raise_signal(error)

        monkeypatch.setattr(importlib.import_module("cli.inspect"), "inspect", inspect)
        return invoke("inspect")

    return fail_with


def test_a_users_mistake_is_one_error_and_one_hint(failing):
    code, out, err = failing(UserError("plan.json is [empty]", hint="make it again"))
    assert (code, out) == (1, "")
    assert err == "error: plan.json is [empty]\nhint: make it again\n"


def test_names_that_are_no_text_are_written_with_escapes(monkeypatch, tmp_path):
    """A path may have any bytes: Python has them as halves of characters, which UTF-8 cannot write."""

    def inspect() -> None:
        console.result("may ship: \udcff", {}, as_json=False)

    monkeypatch.setattr(importlib.import_module("cli.inspect"), "inspect", inspect)
    monkeypatch.setattr(console.SAID, "handlers", [])  # pytest's hands it on to another process, as UTF-8
    out, log = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), tmp_path / "log"
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as leaving:
        main(["--log-file", str(log), "inspect"], verbs=["inspect"])
    out.seek(0)
    assert (leaving.value.code, out.read()) == (None, "may ship: \\udcff\n")
    assert "may ship: \\udcff\n" in log.read_text(encoding="utf-8")


def test_a_failed_proof_exits_with_3_and_prints_names_as_they_are(failing):
    code, out, err = failing(VerificationError("output '[/x]' differs"))
    assert (code, out) == (3, "")
    assert err == "verification failed: output '[/x]' differs\n"


def test_a_missing_package_names_the_extra_that_brings_it(failing):
    code, _, err = failing(ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert code == 1
    assert err == "error: this needs torch, which is not installed\nhint: pip install 'moe-edge[export]'\n"


def test_help_keeps_square_brackets():
    assert "moe-edge[text]" in invoke("run", "--help")[1]


def test_an_unknown_verb_is_a_usage_error():
    code, _, err = invoke("inspect", "--no-such-option")
    assert code == 2
    assert "--no-such-option" in err


def test_a_file_that_may_not_be_read_is_an_error(failing):
    assert failing(PermissionError(13, "Permission denied", "secret.json")) == (
        1,
        "",
        "error: secret.json: Permission denied\nhint: who may read and write it: ls -ld secret.json\n",
    )


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENAMETOOLONG, "File name too long"),
        (errno.EISDIR, "Is a directory"),
        (errno.ENOTDIR, "Not a directory"),
        (errno.EROFS, "Read-only file system"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_system_says_of_a_path_is_an_error(number, said, failing):
    assert failing(OSError(number, said, "a/b")) == (
        1,
        "",
        f"error: a/b: {said}\nhint: check the path, or give another one\n",
    )
    with pytest.raises(OSError, match=said):
        failing(OSError(number, said))  # of no path


def test_what_is_no_mistake_of_the_user_is_not_hidden(failing):
    with pytest.raises(OSError, match="out of luck"):
        failing(OSError("out of luck"))


def test_every_exit_code_of_the_table_is_one_that_commands_end_with(failing):
    endings = {
        exits.DONE: SystemExit(0),
        exits.MISTAKE: UserError("no", hint="yes"),
        exits.USAGE: typer.BadParameter("no"),
        exits.NOT_PROVEN: VerificationError("no"),
        exits.INTERRUPTED: KeyboardInterrupt(),
        exits.READER_GONE: BrokenPipeError(errno.EPIPE, "nobody reads"),
        exits.TERMINATED: signal.SIGTERM,
    }
    assert list(endings) == list(exits.EXITS)
    assert [failing(ending)[0] for ending in endings.values()] == list(exits.EXITS)


def test_a_signal_ends_a_command_in_order_and_is_given_back(failing):
    assert failing(signal.SIGTERM) == (143, "", "interrupted; nothing half-written is left\n")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_somebody_else_takes_is_left_to_them(failing):
    came = []
    signal.signal(signal.SIGTERM, lambda *given: came.append(given[0]))
    try:
        assert failing(signal.SIGTERM)[0] == 0
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
