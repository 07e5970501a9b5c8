"""Tasks on which ways to prune are compared: a trained checkpoint each, data, and a metric."""

import functools
from collections.abc import Callable, Mapping

from benchmarks.tasks import images, language, newsgroups
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Report

TASKS: Mapping[str, Callable[[int, Report], Task]] = {
    "images": lambda seed, _report: images.task(seed),
    "novel": functools.partial(language.task, "novel"),
    "speeches": functools.partial(language.task, "speeches"),
    "code": functools.partial(language.task, "code"),
    "newsgroups": newsgroups.task,
}
"""Makes each task, given the seed of its training (``images``: of its calibration data) and who is told of it."""
