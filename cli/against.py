"""A checkpoint in torch, beside the models that `bench` times.

``python -m cli.against REQUEST`` measures it in a process of its own, as `runtime.measuring.memory` measures files.
"""

import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.options import Against
from exporter.timed_session import CompiledSession, TimedSession, require_compiler
from models.vmoe.assets import fashion_mnist
from moe_spec.errors import UserError, require_known
from moe_spec.identity import checkpoint_sha256, checkpoint_weights
from moe_spec.manifest import FILE_NAME, Manifest
from runtime.measuring.memory import Alone, measure_alone, measure_here
from runtime.measuring.pinning import cores

SESSIONS: Mapping[str, type[TimedSession]] = {Against.EAGER: TimedSession, Against.COMPILED: CompiledSession}
"""By what `--against` takes."""

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class InTorch:
    """A checkpoint that torch runs, called like the export ``like`` (a `runtime.bench.Contestant`)."""

    def __init__(self, how: str, checkpoint: Path, like: Path, *, trust_remote_code: bool = False) -> None:
        self.name, self.directory = f"{how} {checkpoint}", checkpoint
        self._how, self._like, self._trusted = how, like, trust_remote_code
        self._sessions: list[TimedSession] = []

    @property
    def file_bytes(self) -> int:
        """Of its weights."""
        return sum(path.stat().st_size for path in checkpoint_weights(self.directory))

    def open(self, threads: int) -> TimedSession:
        """The checkpoint in this process.

        Raises:
            UserError: it cannot be loaded, is of another model, or there is nothing to compile with.
        """
        self._sessions.append(_open(self._how, self.directory, self._like, threads, trusted=self._trusted))
        return self._sessions[-1]

    def alone(self, leading: int, other: int, past: int, threads: int) -> Alone:
        """What it takes in a process of its own; of torch.compile with all that it compiles, nothing found ready.

        Raises:
            UserError: the process failed.
        """
        further = {"how": self._how, "like": str(self._like.resolve()), "trusted": self._trusted}
        return measure_alone(self.directory, leading, other, past, threads, module="cli.against", **further)

    def notes(self) -> Iterator[str]:
        """What rows do not say, once all is timed."""
        source = Manifest.load(self._like).source_sha256
        if source != checkpoint_sha256(self.directory):
            yield f"{self.directory} is not the checkpoint that {self._like} was made from"
        for session in self._sessions:
            if isinstance(session, CompiledSession):
                yield f"{self.name}: compiled for each shape by itself; load is with compiling, from an empty cache"
                breaks = session.breaks()
                found = "; ".join(breaks) if breaks else "none"
                yield f"{self.name}: graph breaks, where Python runs between compiled parts: {found}"


def in_torch(
    hows: Sequence[str], checkpoint: Path | None, models: Sequence[Path], *, trust_remote_code: bool = False
) -> list[InTorch]:
    """The checkpoint that ``models`` are timed against, in each of the ways ``hows``.

    Args:
        hows: keys of `SESSIONS`.
        checkpoint: its directory; None for the one in this package, where the models were made from it.
        models: the first that has a manifest tells how the checkpoint is called.
        trust_remote_code: run the Python files that the checkpoint's config.json names (`models.own_code`).

    Raises:
        UserError: none of `SESSIONS`; no model has a manifest, the checkpoint is not known, or there is nothing to
            compile with.
    """
    for how in hows:
        require_known(how, "way to run a checkpoint", tuple(map(str, SESSIONS)))
    like = next((model for model in models if (model / FILE_NAME).is_file()), None)
    if like is None:
        raise UserError(
            f"how a checkpoint is called like {models[0]} is not known: it has no {FILE_NAME}",
            hint="time a directory that export, optimize or build wrote",
        )
    if checkpoint is None and Manifest.load(like).source_sha256 != checkpoint_sha256(fashion_mnist()):
        raise UserError(
            f"{like} knows the checkpoint that it was made from by its hash only",
            hint="say where that is: --checkpoint DIRECTORY",
        )
    if Against.COMPILED in hows:
        require_compiler()
    directory = checkpoint or fashion_mnist()
    return [InTorch(how, directory, like, trust_remote_code=trust_remote_code) for how in dict.fromkeys(hows)]


def _open(how: str, checkpoint: Path, like: Path, threads: int, *, trusted: bool) -> TimedSession:
    threads = threads or len(cores()) or os.cpu_count() or 1
    return SESSIONS[how](checkpoint, Manifest.load(like), threads, trust_remote_code=trusted)


def _main(request: Mapping[str, Any]) -> str:
    with tempfile.TemporaryDirectory() as empty:
        os.environ[_CACHE] = empty
        opened = functools.partial(
            _open,
            request["how"],
            Path(request["model"]),
            Path(request["like"]),
            request["threads"],
            trusted=request["trusted"],
        )
        return measure_here(request, opened, compiles=request["how"] == Against.COMPILED)


if __name__ == "__main__":
    sys.stdout.write(_main(json.loads(sys.argv[1])))
