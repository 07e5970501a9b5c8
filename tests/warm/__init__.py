"""Commands that start at once, for tests that run many of them: `moe-edge` and `python` of a folder for the PATH.

Importing torch, transformers and what they bring takes 4 seconds: most of what a command on a tiny model takes. Here
one process (`server.py`) does it once. A command of the folder (`client.py`) hands it all that a process is given, and
a fork of it does what the command does.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
COMMANDS = ("moe-edge", "python")
SOCKET = "server"


@contextlib.contextmanager
def warm_commands(environment: dict[str, str]) -> Iterator[Path]:
    """The folder, while the server runs.

    Args:
        environment: what the server has while it imports; commands come with one of their own.
    """
    with (
        tempfile.TemporaryDirectory(prefix="warm.") as name,  # the path of a socket has 100 characters at most
        socket.socket(socket.AF_UNIX) as listener,
    ):
        folder = Path(name)
        listener.bind(str(folder / SOCKET))
        listener.listen()  # from here on commands wait for the server
        for command in COMMANDS:
            (folder / command).symlink_to(HERE / "client.py")
        arguments = [sys.executable, str(HERE / "server.py"), str(listener.fileno())]
        # the server ends when its stdin does, so it does not outlive tests that are killed
        with subprocess.Popen(
            arguments, stdin=subprocess.PIPE, env={**os.environ, **environment}, pass_fds=[listener.fileno()]
        ):
            yield folder
