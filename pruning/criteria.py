"""Criteria: what one MoE layer's statistics say about its experts. Higher is kept; ties go to the lower id."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from moe_spec.statistics import LayerStatistics

Scores = npt.NDArray[np.float64]
"""(E,), higher is kept."""


def frequency(layer: LayerStatistics) -> Scores:
    """How many tokens selected the expert, ``S_e = n_e``. The usual baseline; blind to what the expert gives."""
    return layer["tokens"]


def gate_mass(layer: LayerStatistics) -> Scores:
    """Sum of the weights with which the expert was selected, ``S_e = G_e``.

    One reading of SEER-MoE's soft count, https://arxiv.org/abs/2404.05089: over the tokens that selected the expert.
    """
    return layer["gate"]


def reap(layer: LayerStatistics) -> Scores:
    """Mean weighted output norm, ``S_e = 1/n_e sum_t g_e(t) ||f_e(t)||_2``. An expert that no token selected scores 0.

    REAP, https://arxiv.org/abs/2510.13999.
    """
    return layer["gated_norm"] / np.maximum(layer["tokens"], 1)


def random(experts: int, generator: np.random.Generator) -> Scores:
    """A baseline without data: uniform in [0, 1).

    >>> random(2, np.random.default_rng(0)).round(3)
    array([0.637, 0.27 ])
    """
    return generator.random(experts)


CRITERIA: Mapping[str, Callable[[LayerStatistics], Scores]] = {
    "frequency": frequency,
    "gate-mass": gate_mass,
    "reap": reap,
}
"""Criteria that rank by calibration statistics."""

DATA_FREE_CRITERIA: Mapping[str, Callable[[int, np.random.Generator], Scores]] = {"random": random}
"""Criteria that need no statistics: E and a seeded generator."""
