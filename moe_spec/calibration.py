"""A calibration run: batch after batch added up, and kept on the way, so that a killed run goes on where it was."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.progress import Progress, silent
from moe_spec.record import Json, load_record, save_record
from moe_spec.runner import Feeds
from moe_spec.statistics import LayerStatistics, Statistics

SCHEMA = 1
RUN = "run.json"

Layers = tuple[LayerStatistics, ...]

Take = Callable[[Feeds], Layers]
"""Gives the statistics of one batch."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What has to be the same for a run to go on where another one was stopped.

    Attributes:
        model_sha256: identity of the model.
        data_sha256: hash of the data.
        examples: how many of the data are used, over all processes.
        batch_size: examples a forward pass: the order of summation depends on it.
        processes: how many share the examples.
        options: what else decides the sums.
    """

    model_sha256: str
    data_sha256: str
    examples: int
    batch_size: int
    processes: int = 1
    options: Json = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Shards:
    """Where a run keeps what it has: in each file the sums of all examples that one process is through with.

    A file holds everything up to its last example, not its own shard only: float64 sums depend on their order, and so
    a run that was killed and one that was not give the same bytes.

    Attributes:
        directory: removed at the end of the run.
        run: what the files are of.
        size: examples after which the next file is written; None: never. Whole batches are kept.
        rank: of the process.
    """

    directory: Path
    run: Run
    size: int | None = None
    rank: int = 0

    def last(self) -> tuple[int, Layers]:
        """The examples that an earlier run was through with, and their statistics; 0 and none where there was no run.

        Raises:
            UserError: the shards are of another run, or are damaged.
        """
        if not self.directory.exists():
            return 0, ()
        self._require_same_run()
        files = self._files()
        return (int(files[-1].stem.rpartition("-")[2]), Statistics.load(files[-1]).layers) if files else (0, ())

    def keep(self, done: int, layers: Layers) -> None:
        """Keep ``layers``, the sums over the first ``done`` examples."""
        before = self._files()
        if not (self.directory / RUN).exists():
            save_record(self.directory / RUN, "calibration run", SCHEMA, dataclasses.asdict(self.run))
        statistics = Statistics(self.run.model_sha256, (self.run.data_sha256,), layers)
        statistics.save(self.directory / f"process{self.rank}-{done:012}.safetensors")
        for path in before:
            path.unlink()

    def remove(self) -> None:
        """Forget everything: the run has come to its end."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _files(self) -> list[Path]:
        """Those of this process, in order; a killed process may leave two."""
        return sorted(self.directory.glob(f"process{self.rank}-*.safetensors"))

    def _require_same_run(self) -> None:
        again = f"run the command as it was, or start anew: rm -r {self.directory}"
        record = load_record(self.directory / RUN, "calibration run", SCHEMA, again)
        for key, mine in dataclasses.asdict(self.run).items():
            theirs: Any = record.take(key, type(mine))
            if theirs != mine:
                raise UserError(
                    f"{self.directory} holds the shards of a run with {key} {_short(theirs)}, this one has "
                    f"{_short(mine)}",
                    hint=again,
                )


def shards_of(out: Path) -> Path:
    """The directory beside ``out`` in which a run keeps what it has.

    >>> shards_of(Path("statistics.safetensors")).name
    'statistics.safetensors.shards'
    """
    return out.with_name(f"{out.name}.shards")


def accumulate(
    dataset: Dataset, take: Take, shards: Shards, *, batch_size: int, on_progress: Progress = silent
) -> Layers:
    """The statistics of all batches of ``dataset``, added up in order, from where an earlier run was stopped.

    Raises:
        UserError: the shards are of another run.
    """
    done, layers = shards.last()
    kept = done
    on_progress("calibrating", done, len(dataset))
    for feeds in dataset.part(done, len(dataset)).batches(batch_size):
        layers = _add(layers, take(feeds))
        done = min(done + batch_size, len(dataset))
        if shards.size is not None and done - kept >= shards.size:
            shards.keep(done, layers)
            kept = done
        on_progress("calibrating", done, len(dataset))
    return layers


def _add(layers: Layers, more: Layers) -> Layers:
    return tuple(one.add(other) for one, other in zip(layers, more, strict=True)) if layers else more


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else f"{value}"
