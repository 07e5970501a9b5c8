"""Between which numbers the logits and the ranks of a router lie, for every input, in float64.

Softmax and sigmoid scores lie in [0, 1]; logits, and roots of softplus, are bounded behind a normalisation only. A
logit of -inf is exact.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from graph_passes.record.block import TOPK_FIRST, Router
from graph_passes.unreachable.norms import Vector, read_norm

SLACK = 1.01
"""Room for the rounding of a router that computes in less than float64."""

MARGIN = 0.01
"""How far, relatively, two ranks must lie apart to stay in order when they are rounded, to bfloat16 at worst."""

QUIET = -30.0
"""A softmax of a logit this far below another is lost in the rounding of the sum, in float32."""

ALWAYS_ZERO = -800.0
"""A softmax of a logit this far below another is 0 in float64 too, and so is the sigmoid of such a logit."""


@dataclasses.dataclass(frozen=True)
class Ranges:
    """(E,) each; expert e ranks within ``[low[e], high[e]]``.

    Attributes:
        masked: the logit is -inf, or what is ranked where that is the logit plus a bias.
        weightless: the score is 0 for every input.
        quiet: the scores of the others are the same without it.
        bounded: whether the logits are.
    """

    low: Vector
    high: Vector
    masked: npt.NDArray[np.bool_]
    weightless: npt.NDArray[np.bool_]
    quiet: npt.NDArray[np.bool_]
    bounded: bool

    def beats(self, biased: bool) -> npt.NDArray[np.bool_]:
        """(E, E): [j, e] whether j ranks before e for every input, or beside it with both scores 0.

        ``biased``: a selection bias is added to the scores, so that a score of 0 may rank high.
        """
        low, high = self.low[:, None], self.high[None, :]
        room = MARGIN * np.maximum(1.0, np.maximum(np.abs(np.nan_to_num(low)), np.abs(np.nan_to_num(high))))
        with np.errstate(invalid="ignore"):
            above = low > high + room
        if not biased:
            above |= ~self.masked[:, None] & self.masked[None, :]
        return above


def ranges_of(router: Router, directory: Path) -> Ranges:
    """The ranges of what ``router`` ranks, groups left aside."""
    low, high = _logits(router, directory)
    masked = high == -np.inf
    others = np.max(low, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        behind = np.where(masked, -np.inf, high - (others if router.score == "softmax" else 0.0))
    weightless = masked | (behind < ALWAYS_ZERO)
    quiet = masked | (behind < QUIET) | _keeps_shares(router)
    bounded = bool(np.isfinite(low[~masked]).all())
    by_logit = router.order == TOPK_FIRST or router.score == "sparsemixer"
    if not by_logit and (router.selection_bias_E is not None or router.score in ALONE):
        low, high = _scores(router.score, low, high, behind)
    if router.selection_bias_E is not None:
        bias = router.selection_bias_E.load().astype(np.float64)
        never = np.isneginf(bias)
        low, high = low + bias, np.where(never, bias, high + np.where(never, 0.0, bias))  # high may be infinite
        masked |= by_logit & never
    return Ranges(low, high, masked, weightless, quiet, bounded)


def _keeps_shares(router: Router) -> bool:
    """Whether the weights of the chosen stay the same, whatever share another one had."""
    if router.score == "sparsemixer":
        return False
    if router.score in ALONE or router.order == TOPK_FIRST:
        return True
    return router.renormalize and router.eps == 0 and router.selection_bias_E is None and router.groups is None


def _logits(router: Router, directory: Path) -> tuple[Vector, Vector]:
    experts, width = router.weight_EH.shape
    bias = np.zeros(experts) if router.bias_E is None else router.bias_E.load().astype(np.float64)
    norm = read_norm(router.hidden, width, directory)
    if norm is None:
        reach = np.where(np.isneginf(bias), 0.0, np.inf)
        return bias - reach, bias + reach
    weight = router.weight_EH.load().astype(np.float64)
    centre = weight @ norm.bias
    reach = np.linalg.norm(weight * norm.scale, axis=1) * np.sqrt(width) * SLACK + (SLACK - 1) * np.abs(centre)
    return bias + centre - reach, bias + centre + reach


def _scores(score: str, low: Vector, high: Vector, behind: Vector) -> tuple[Vector, Vector]:
    """``behind``: how far, at most, a logit lies above the surest other."""
    if score in ALONE:
        return ALONE[score](low), ALONE[score](high)
    return np.zeros_like(low), np.exp(np.minimum(behind, 0.0))


def _sigmoid(logits: Vector) -> Vector:
    return 1.0 / (1.0 + np.exp(-np.clip(logits, -700.0, 700.0))) * (logits > ALWAYS_ZERO)


def _sqrtsoftplus(logits: Vector) -> Vector:
    return np.sqrt(np.logaddexp(0.0, logits)) * (logits > ALWAYS_ZERO)


ALONE: Mapping[str, Callable[[Vector], Vector]] = {"sigmoid": _sigmoid, "sqrtsoftplus": _sqrtsoftplus}
"""Scores that grow with the expert's own logit, whatever the others are."""
