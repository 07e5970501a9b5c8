"""Directories that are being written, hidden beside what they become; and what is left of runs that were killed.

A run holds a lock on its directory. The system drops it when the run ends, however it ends: what has no lock belongs to
nobody, and the next run to the same place removes it. Windows and some network disks have no such locks; nothing is
removed there.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_SUFFIX = ".moe-edge"  # so that no hidden directory of a user's is taken for one


@contextlib.contextmanager
def staging_directory(path: Path) -> Iterator[Path]:
    """A new directory beside ``path``, locked within the block; removed at its end if it is still there."""
    for left in path.parent.glob(f".{path.name}.*{_SUFFIX}"):
        _remove_abandoned(left)
    staging, handle = _create(path)
    try:
        staging.chmod(0o755)
        yield staging
    finally:  # ctrl-C too: nothing half-written is left behind
        shutil.rmtree(staging, ignore_errors=True)
        _unlock(handle)


def _create(path: Path) -> tuple[Path, int | None]:
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent))
        handle = _lock(staging, wait=True)
        if staging.exists():
            return staging, handle
        _unlock(handle)  # another run took it for abandoned, before the lock was there


def _remove_abandoned(directory: Path) -> None:
    handle = _lock(directory, wait=False)
    if handle is not None:
        shutil.rmtree(directory, ignore_errors=True)
        _unlock(handle)


def _lock(directory: Path, *, wait: bool) -> int | None:
    """A handle that locks ``directory`` until it is closed; None where that cannot be, or another run has it."""
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
