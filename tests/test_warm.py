"""A warm command is the command: what it is given, prints and ends with is that of a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.markdown import ENVIRONMENT

INSTALLED = Path(sys.executable).parent
GIVEN = "import os, sys; print(sys.argv, os.getcwd(), os.environ['WORD'], sys.path[0], __name__, sys.stdin.read())"
ENDINGS = {
    "the end": "import atexit; atexit.register(print, 'last'); print('first')",
    "a code": "import sys; sys.exit(7)",
    "a reason": "import sys; sys.exit('because')",
    "a signal": "import os; os.kill(os.getpid(), 15)",
    "other streams": "import sys; sys.stdout.reconfigure(errors='replace'); print(sys.stdout.seekable())",
    "threads": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
}


def ran(folder, directory, *command, **how):
    environment = {**os.environ, **ENVIRONMENT, "WORD": "ß", "PATH": f"{folder}:{INSTALLED}:{os.environ['PATH']}"}
    found = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, **how)
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["plan"], ["plan", "nothing", "-o", "plan.json"]])
def test_the_command_prints_and_ends_as_the_installed_one(arguments, commands, tmp_path):
    assert ran(commands, tmp_path, "moe-edge", *arguments) == ran(INSTALLED, tmp_path, "moe-edge", *arguments)


@pytest.mark.parametrize("arguments", [["-c", GIVEN, "a", "-c"], ["folder/given.py", "a b"]])
def test_python_gets_what_it_is_given(arguments, commands, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "given.py").write_text(GIVEN)
    warm, own = (ran(folder, tmp_path, "python", *arguments, input="typed") for folder in (commands, INSTALLED))
    assert warm == own
    assert warm[1].endswith("typed\n")


def test_python_does_what_it_reads(commands, tmp_path):
    warm, own = (
        ran(folder, tmp_path, "python", "-", "a b", input=f"{GIVEN}\nprint(__name__)")
        for folder in (commands, INSTALLED)
    )
    assert warm == own
    assert warm[1].endswith("__main__\n")


@pytest.mark.parametrize("code", ENDINGS.values(), ids=ENDINGS)
def test_python_ends_as_python_does(code, commands, tmp_path):
    assert ran(commands, tmp_path, "python", "-c", code) == ran(INSTALLED, tmp_path, "python", "-c", code)


def test_an_exception_is_an_end_with_a_traceback(commands, tmp_path):
    code, out, err = ran(commands, tmp_path, "python", "-c", "print(1); 1 / 0")
    assert (code, out) == (1, "1\n")
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: division by zero\n")


def test_a_signal_reaches_what_runs(commands, tmp_path):
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([commands / "python", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 5


def test_a_pipe_has_a_warm_command_at_both_ends(commands, tmp_path):
    line = "python -c 'print(\"x\" * 100_000)' | python -c 'import sys; print(len(sys.stdin.read()))'"
    assert ran(commands, tmp_path, "bash", "-c", line) == (0, "100001\n", "")


def test_torch_is_there_at_once(commands, tmp_path):
    code = "import sys; print('torch' in sys.modules, 'onnxruntime' in sys.modules)"
    assert ran(commands, tmp_path, "python", "-c", code) == (0, "True False\n", "")
