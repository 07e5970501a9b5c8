"""Criteria: what is known of one MoE layer's experts, as one number each. Higher is kept; ties go to the lower id.

Criteria by statistics take a layer's sums; an expert that no token selected scores 0 by each of them.
"""

from collections.abc import Callable, Mapping

import numpy as np

from moe_spec.statistics import LayerStatistics
from pruning.criteria.by_weights import aimer, router_norm
from pruning.criteria.moments import NAMED, parse_moment
from pruning.criteria.published import easy_ep, mone, seer_soft
from pruning.criteria.scores import Scores


def random(experts: int, generator: np.random.Generator) -> Scores:
    """A baseline without data: uniform in [0, 1).

    >>> random(2, np.random.default_rng(0)).round(3)
    array([0.637, 0.27 ])
    """
    return generator.random(experts)


__all__ = [
    "CHANGE_CRITERIA",
    "CRITERIA",
    "DATA_FREE_CRITERIA",
    "NAEE",
    "WEIGHT_CRITERIA",
    "Criterion",
    "Scores",
    "by_statistics",
]

Criterion = Callable[[LayerStatistics], Scores]

CRITERIA: Mapping[str, Criterion] = {
    **NAMED,
    "seer-soft": seer_soft,
    "easy-ep": easy_ep,
    "mone": mone,
}
"""Criteria that rank by calibration statistics; so does any ``s(b,alpha,beta)``."""

DATA_FREE_CRITERIA: Mapping[str, Callable[[int, np.random.Generator], Scores]] = {"random": random}
"""Criteria that need no statistics: E and a seeded generator."""

WEIGHT_CRITERIA: Mapping[str, Callable[..., list[Scores]]] = {"aimer": aimer}
"""Criteria that read the weights of a checkpoint; scores below 0 among them, so they rank within a layer."""

CHANGE_CRITERIA: Mapping[str, Callable[..., list[Scores]]] = {"router-norm": router_norm}
"""Criteria that compare a checkpoint with the one that it was fine-tuned from; they rank within a layer too."""

NAEE = "naee"
"""The criterion that ranks nothing: it searches on data (`pruning.reconstruction`)."""


def by_statistics(name: str) -> Criterion | None:
    """The criterion of that name that ranks by statistics, if there is one.

    Raises:
        UserError: an ``s(b,alpha,beta)`` of which no sum is taken.
    """
    return CRITERIA.get(name) or parse_moment(name)
