"""Imports the libraries, then becomes each command that is asked for, in a fork.

A fork has one thread only, so nothing is imported that starts another: ONNX Runtime does.
"""

import atexit
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    "exporter.export",
    "graph_passes.optimize",
    "networkx",
    "onnx.reference.ops",
    "onnx_graphsurgeon",
    "onnxscript.function_libs.torch_lib.ops",
    "onnxscript.rewriter",
    "pruning.apply",
    "pruning.calibrate",
    "pydantic",
    "torch._export",
    "torch._functorch.aot_autograd",
    "torch.distributed.tensor",
    "torch.export",
    "torch.onnx._internal.exporter._core",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
)
"""What commands import, and what that imports when it is first used; not `cli`, which looks at its terminal."""


def main(listener: socket.socket) -> None:
    """Serve until stdin ends; in a fork, do what was asked for and end as the interpreter does."""
    for library in LIBRARIES:
        importlib.import_module(library)
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("a library started a thread, which a fork would lack")
    gc.collect()
    gc.freeze()  # a fork that never looks at these objects need not copy them
    request = next_request(listener)
    if request is not None:
        end(functools.partial(run, request["argv"]))


def next_request(listener: socket.socket) -> dict[str, Any] | None:
    """In a new process for each: what it is to do. None when there are no more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that answer
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return answer(connection)
        connection.close()


def answer(connection: socket.socket) -> dict[str, Any]:
    """Fork once more; the child returns, and what becomes of it is sent."""
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        request: dict[str, Any] = json.loads(stream.read(int.from_bytes(head, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        move_into(request, files)
        return request
    for file in files:
        os.close(file)
    send(connection, child)
    _, status = os.waitpid(child, 0)
    send(connection, os.waitstatus_to_exitcode(status))
    os._exit(0)


def send(connection: socket.socket, number: int) -> None:
    """As the client receives it."""
    connection.sendall(number.to_bytes(4, "big", signed=True))


def move_into(request: dict[str, Any], files: list[int]) -> None:
    """Take the standard files, folder and environment of the client."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # streams of their own: those that there are know whether what the server was given can be sought in
    sys.stdin = os.fdopen(0, encoding=sys.stdin.encoding, closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding=sys.stdout.encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, sys.stderr.encoding, "backslashreplace", closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])


def run(argv: list[str]) -> None:
    """What the installed command does, or the interpreter with a script, ``-c`` or ``-``."""
    program, *arguments = argv
    name = Path(program).name
    if name != "python":
        sys.path[0], sys.argv = str(Path(sys.executable).parent), argv
        (command,) = importlib.metadata.entry_points(group="console_scripts", name=name)
        sys.exit(command.load()())
    elif arguments[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-":
        sys.path[0], sys.argv = "", arguments
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(arguments[0]).resolve().parent), arguments
        runpy.run_path(arguments[0], run_name="__main__")


def end(work: Callable[[], None]) -> NoReturn:
    """Do the work and end as the interpreter does, but leave the objects of the libraries to the kernel."""
    code: Any = None
    try:
        work()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
