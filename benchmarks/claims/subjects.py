"""Tasks of the claims that are none of ``benchmarks.tasks``."""

import dataclasses
from pathlib import Path

import numpy as np

from benchmarks.tasks import images, language
from benchmarks.tasks.cache import cached
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Report
from moe_spec.dataset import IMAGES
from moe_spec.files import sha256_file
from moe_spec.record import Json

NAME = "turned"
DOMAIN = "code"

SMALL = language.Recipe(hidden=64, width=32, layers=2, steps=400)
"""Quick to train, so that one with few experts can be trained from scratch beside one that lost them; and narrow, so
that many experts know more than few."""


def turned() -> Task:
    """The embedded V-MoE is to learn the same ten classes from images that lie on their side.

    It knows none of them so, and has to change: `images` it knows already.

    Raises:
        UserError: the images cannot be fetched.
    """
    upright = images.task()
    files = {name: getattr(upright, name) for name in ("calibration", "finetune", "test")}

    def make(directory: Path) -> Json:
        for name, path in files.items():
            with np.load(path) as data:
                on_their_side = {**data, IMAGES: np.rot90(data[IMAGES], axes=(1, 2))}
            np.savez_compressed(directory / f"{name}.npz", **on_their_side)
        return {}

    directory = cached(NAME, {name: sha256_file(path) for name, path in files.items()}, make)
    calibration, finetune, test = (directory / f"{name}.npz" for name in files)
    return dataclasses.replace(upright, name=NAME, calibration=calibration, finetune=finetune, test=test)


def small_language(experts: int, seed: int, report: Report) -> Task:
    """A small Mixtral of so many experts, from scratch on all domains, judged on `DOMAIN`; K=2, or 1 of one expert.

    Raises:
        UserError: the text cannot be fetched.
    """
    return language.task(
        DOMAIN, seed, report, dataclasses.replace(SMALL, experts=experts, top_k=min(SMALL.top_k, experts))
    )
