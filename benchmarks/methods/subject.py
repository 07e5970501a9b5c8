"""What all methods are given: a task's model, and the statistics of its calibration data."""

import dataclasses
import functools
from pathlib import Path

from benchmarks.tasks.cache import cached
from benchmarks.tasks.task import Task
from moe_spec.files import sha256_file
from moe_spec.identity import checkpoint_sha256
from moe_spec.record import Json
from pruning.calibrate import calibrate

VERSION = 2
"""Raised when the code here makes other numbers of the same task and seed."""

STATISTICS = "statistics.safetensors"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A task at one seed.

    Attributes:
        task: model and data; either may be of that seed.
        seed: of what is drawn here: random experts, new routers, the order of examples.
    """

    task: Task
    seed: int

    @functools.cached_property
    def model(self) -> Json:
        """What every number depends on."""
        return {"task": self.task.name, "model": checkpoint_sha256(self.task.checkpoint), "version": VERSION}

    @functools.cached_property
    def calibrated(self) -> Json:
        """What every choice of experts depends on."""
        return self.model | {"calibration": sha256_file(self.task.calibration)}

    @functools.cached_property
    def statistics(self) -> Path:
        """The statistics of the calibration data, dense ones too; taken once."""

        def make(directory: Path) -> Json:
            calibrate(self.task.checkpoint, self.task.calibration, directory / STATISTICS, dense=True)
            return {}

        return cached(f"statistics-{self.task.name}", self.calibrated, make) / STATISTICS
