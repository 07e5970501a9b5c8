#!/usr/bin/env -S python3 -IS
"""A command: hands what it was given to the server beside it, and ends as the server's child does."""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """The exit code of the child; negative: the signal that ended it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until it is known to whom
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.path.join(os.path.dirname(sys.argv[0]), "server"))  # noqa: PTH118, PTH120 - starts at once
        request = json.dumps({"argv": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()  # noqa: PTH109
        socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(request)
        child = receive(connection)
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(child, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        return receive(connection)


def receive(server: socket.socket) -> int:
    """The next number that the server sends."""
    data = server.recv(4)
    if not data:
        sys.exit("the server of warm commands is gone")
    return int.from_bytes(data, signed=True, byteorder="big")


if __name__ == "__main__":
    code = main()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
