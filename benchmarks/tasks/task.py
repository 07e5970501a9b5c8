"""What a task is: a checkpoint to prune, data to prune it with, and a number that says how good it is."""

import dataclasses
import functools
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.tasks.cache import noted
from benchmarks.tasks.metrics import Metric
from moe_spec.dataset import Dataset, load_dataset


@dataclasses.dataclass(frozen=True)
class Task:
    """One model and one use of it.

    Attributes:
        name: as in ``benchmarks.tasks.TASKS``.
        checkpoint: transformers directory, not pruned, with its recipe.json.
        calibration: .npz for ``moe-edge calibrate``.
        finetune: .npz of training examples; with ``labels`` where the task is classification.
        test: .npz of examples that neither the model nor the other two files saw.
        metric: of a model on ``test``.
    """

    name: str
    checkpoint: Path
    calibration: Path
    finetune: Path
    test: Path
    metric: Metric

    def read(self, data: Path) -> Dataset:
        """One of the three files, as the model takes it; kept, for it is asked for again and again."""
        return _load(data, self.checkpoint)

    def evaluate(self, model: PreTrainedModel) -> float:
        """The metric of ``model``, which is in eval mode afterwards.

        Its experts run one after the other, which is the quickest that transformers has for a few tokens each on a CPU.
        """
        model.train(False)
        model.set_experts_implementation("eager")
        return self.metric.measure(model, self.read(self.test))

    @property
    def training_seconds(self) -> float:
        """What training the checkpoint took, on one thread."""
        return noted(self.checkpoint, "training_seconds")


@functools.lru_cache(maxsize=3)
def _load(data: Path, checkpoint: Path) -> Dataset:
    return load_dataset(data, checkpoint)
