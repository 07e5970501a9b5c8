"""Criteria: what is known of one MoE layer's experts, as one number each. Higher is kept; ties go to the lower id.

Criteria by statistics take a layer's sums; an expert that no token selected scores 0 by each of them but ``seer-soft``,
which adds up what the router gave it all the same.
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
    "NOTES",
    "PAPERS",
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

NOTES: Mapping[str, str] = {
    "easy-ep": "the paper adds what experts give to the residual stream, and takes the cosine of before and after; "
    "this plan adds it to what they read, which most families normalise first",
}
"""Points in which a criterion is not what the paper does: ``plan`` says them."""

PAPERS: Mapping[str, tuple[str, str]] = {
    "seer-actual": ("SEER-MoE", "https://arxiv.org/abs/2404.05089"),
    "gate-mass": ("SEER-MoE", "https://arxiv.org/abs/2404.05089"),
    "seer-soft": ("SEER-MoE", "https://arxiv.org/abs/2404.05089"),
    "ean": ("EAN", "https://arxiv.org/abs/2504.05586"),
    "man": ("MAN, MSAN", "https://arxiv.org/abs/2606.15716"),
    "msan": ("MAN, MSAN", "https://arxiv.org/abs/2606.15716"),
    "task": ("MAN, MSAN", "https://arxiv.org/abs/2606.15716"),
    "task-squared": ("MAN, MSAN", "https://arxiv.org/abs/2606.15716"),
    "reap": ("REAP", "https://arxiv.org/abs/2510.13999"),
    "easy-ep": ("EASY-EP", "https://arxiv.org/abs/2504.06792"),
    "mone": ("MoNE", "https://arxiv.org/abs/2507.00390"),
    "aimer": ("AIMER", "https://arxiv.org/abs/2603.18492"),
    "router-norm": ("Chowdhury et al.", "https://arxiv.org/abs/2405.16646"),
    NAEE: ("NAEE", "https://arxiv.org/abs/2402.14800"),
    "uncurl": ("UNCURL", "https://arxiv.org/abs/2409.01483"),
    "m-smoe": ("M-SMoE", "https://arxiv.org/abs/2310.01334"),
    "hc-smoe": ("HC-SMoE", "https://arxiv.org/abs/2410.08589"),
    "hc-smoe-cosine": ("REAP's HC-SMoE", "https://arxiv.org/abs/2510.13999"),
    "ream": ("REAM", "https://arxiv.org/abs/2604.04356"),
}
"""Where each criterion, and each merger, was published: name and link. What is in no paper is not here."""


def by_statistics(name: str) -> Criterion | None:
    """The criterion of that name that ranks by statistics, if there is one.

    Raises:
        UserError: an ``s(b,alpha,beta)`` of which no sum is taken.
    """
    return CRITERIA.get(name) or parse_moment(name)
