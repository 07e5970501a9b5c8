"""What the exit code of a command says."""

from collections.abc import Mapping

DONE, MISTAKE, USAGE, NOT_PROVEN, INTERRUPTED = 0, 1, 2, 3, 130
READER_GONE, TERMINATED = 141, 143
"""What a shell reports of a tool that SIGPIPE or SIGTERM ended: 128 and the signal's number."""

EXITS: Mapping[int, str] = {
    DONE: "done",
    MISTAKE: "an error that you can mend: the hint says how",
    USAGE: "a verb or option that there is not, or one that is missing",
    NOT_PROVEN: "not proven: verify failed, or the proof of export, optimize or demo",
    INTERRUPTED: "interrupted (ctrl-C)",
    READER_GONE: "nobody read on (`| head`)",
    TERMINATED: "ended by `kill` (SIGTERM)",
}
