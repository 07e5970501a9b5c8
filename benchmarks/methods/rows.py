"""The rows of the two tables: every choice of experts as it is, and every choice with training afterwards."""

import statistics
from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.methods.cells import cell
from benchmarks.methods.choices import CHOICES, plan_of
from benchmarks.methods.subject import Subject
from moe_spec.statistics import Statistics
from pruning.budget.keep import Keep
from pruning.budget.ranked import RankedLayer
from pruning.finetuning.options import Method, Plain, RouterKD, Seer, TaskSpecific

UNPRUNED = "before pruning"
RANDOM, RANDOM_DRAWS = ("random", "random, full router"), 5

Row = Callable[[Subject, Keep], float | None]
"""A cell of one row; None where it cannot be."""


def untrained(choice: str) -> Row:
    """Nothing follows; of random experts the mean of several draws."""

    def measure(subject: Subject, keep: Keep) -> float | None:
        values = [_cell(subject, choice, keep, draw) for draw in range(RANDOM_DRAWS if choice in RANDOM else 1)]
        known = [value for value in values if value is not None]
        return statistics.mean(known) if known else None

    return measure


def recovered(choice: str, method: Callable[[Subject], Method] = lambda _subject: Plain()) -> Row:
    """Training follows; of random experts one draw."""
    return lambda subject, keep: _cell(subject, choice, keep, 0, method(subject))


def _cell(subject: Subject, choice: str, keep: Keep, draw: int, method: Method | None = None) -> float | None:
    plan = plan_of(subject, choice, keep, RANDOM_DRAWS * subject.seed + draw)
    return None if plan is None else cell(subject, plan, method)


def task_specific(subject: Subject, keep: Keep) -> float | None:
    """Experts go while the whole model is trained."""
    layer = Statistics.load(subject.statistics).layers[0]
    floor = RankedLayer(layer.name, layer.top_k, layer.groups, np.zeros(layer.experts)).count(keep)
    return cell(subject, None, TaskSpecific(floor=floor))


UNTRAINED: Mapping[str, Row] = {
    UNPRUNED: lambda subject, _keep: cell(subject, None),
    **{choice: untrained(choice) for choice in CHOICES},
}

RECOVERED: Mapping[str, Row] = {
    UNPRUNED: lambda subject, _keep: cell(subject, None, Plain()),
    **{choice: recovered(choice) for choice in CHOICES},
    "reap, router-kd": recovered("reap", lambda subject: RouterKD(subject.task.checkpoint)),
    "seer-soft, global, K to 1": recovered("seer-soft, global", lambda _subject: Seer(top_k=1)),
    "task-specific": task_specific,
}
"""With the methods that train in a way of their own."""
