"""The embedded V-MoE with the whole of Fashion-MNIST: training images to fine-tune with, test images to judge by."""

from pathlib import Path

import numpy as np

from benchmarks.tasks.cache import cached
from benchmarks.tasks.metrics import ACCURACY
from benchmarks.tasks.sources import FASHION_MNIST, fetch
from benchmarks.tasks.task import Task
from models.vmoe.assets import fashion_mnist
from models.vmoe.idx import load_split
from moe_spec.record import Json

FILES = {"train": "finetune.npz", "t10k": "test.npz"}
"""The official splits, and what they are called here."""


CALIBRATION, CALIBRATION_IMAGES = "calibration.npz", 1000


def task(seed: int = 0) -> Task:
    """Prune the embedded model, of which there is one; ``seed`` draws the calibration images out of the training ones.

    Raises:
        UserError: the images cannot be fetched.
    """
    checkpoint, directory = fashion_mnist(), images(fetch(FASHION_MNIST))
    return Task(
        name="images",
        checkpoint=checkpoint,
        calibration=draw(directory / FILES["train"], seed),
        finetune=directory / FILES["train"],
        test=directory / FILES["t10k"],
        metric=ACCURACY,
    )


def images(idx_files: Path) -> Path:
    """The directory with both splits as task data: uint8 images (N, 28, 28) and labels (N,); made the first time.

    Args:
        idx_files: directory with Fashion-MNIST as its authors publish it; its name, which tells what is in it, is what
            the result is found by.
    """

    def make(directory: Path) -> Json:
        for name, file_name in FILES.items():
            split = load_split(idx_files, name)
            np.savez_compressed(directory / file_name, images=split.images, labels=split.labels)
        return {}

    return cached("images", {"source": idx_files.name, "version": 1}, make)


def draw(training: Path, seed: int) -> Path:
    """Calibration images out of the task data in ``training``, whose directory tells what is in it; drawn once."""

    def make(directory: Path) -> Json:
        with np.load(training) as split:
            chosen = np.random.default_rng(seed).choice(len(split["labels"]), CALIBRATION_IMAGES, replace=False)
            np.savez_compressed(directory / CALIBRATION, **{name: split[name][chosen] for name in split.files})
        return {}

    recipe = {"source": training.parent.name, "seed": seed, "count": CALIBRATION_IMAGES, "version": 1}
    return cached("images-calibration", recipe, make) / CALIBRATION
