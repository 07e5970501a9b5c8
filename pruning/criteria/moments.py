"""One family of criteria, and the seven published ones that are members of it."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from moe_spec.errors import UserError
from moe_spec.statistics import LayerStatistics
from pruning.criteria.scores import Scores

SUMS: Mapping[tuple[int, int], str] = {
    (0, 0): "tokens",
    (1, 0): "gate",
    (2, 0): "gate_squared",
    (0, 1): "output_norm",
    (0, 2): "output_norm_squared",
    (1, 1): "gated_norm",
    (2, 2): "gated_norm_squared",
}
"""The statistic that is the sum of ``g^alpha ||f||^beta``, by (alpha, beta)."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """``S_e(b, alpha, beta) = 1/n_e^b sum over X_e of g_e(x)^alpha ||f_e(x)||_2^beta``, 0 where n_e is 0.

    X_e are the n_e tokens x that selected expert e; g_e(x) is the weight that really multiplied its output f_e(x).
    The family is that of https://arxiv.org/abs/2606.15716.

    Attributes:
        b: 0 sums over tokens, so a busy expert counts for more; 1 is the mean.
        alpha: power of the weight.
        beta: power of the output's norm.

    >>> sums = {"tokens": np.array([2.0, 0.0]), "gated_norm": np.array([3.0, 0.0])}
    >>> Moment(1, 1, 1)(LayerStatistics("mlp", experts=2, top_k=1, token_count=2, sums=sums))
    array([1.5, 0. ])
    """

    b: int
    alpha: int
    beta: int

    def __call__(self, layer: LayerStatistics) -> Scores:
        """(E,), by the sums of ``layer``."""
        scores: Scores = layer[SUMS[self.alpha, self.beta]] / np.maximum(layer["tokens"], 1) ** self.b
        return scores


NAMED: Mapping[str, Moment] = {
    "frequency": Moment(0, 0, 0),  # how many tokens selected it: the usual baseline, blind to what the expert gives
    "seer-actual": Moment(0, 0, 0),  # the actual count of SEER-MoE, https://arxiv.org/abs/2404.05089
    "gate-mass": Moment(0, 1, 0),  # SEER-MoE's soft count, read as over the tokens that selected the expert
    "ean": Moment(0, 0, 1),  # https://arxiv.org/abs/2504.05586, as REAP restates it
    "man": Moment(1, 0, 1),  # https://arxiv.org/abs/2606.15716, for models that shall stay general
    "msan": Moment(1, 0, 2),  # the same
    "task": Moment(0, 1, 1),  # the same, for one task
    "task-squared": Moment(0, 2, 2),  # the same
    "reap": Moment(1, 1, 1),  # https://arxiv.org/abs/2510.13999
}
"""Published criteria. EAN's own equation takes norms over tokens for each hidden unit and adds those up; what everybody
compares with, and what this is, adds up the norms of single outputs."""

SHAPE = "s(b,alpha,beta)"
_WRITTEN = re.compile(r"s\( *(\d+) *, *(\d+) *, *(\d+) *\)")


def parse_moment(text: str) -> Moment | None:
    """``s(1,1,1)`` as a member of the family; None for what is not written so.

    Raises:
        UserError: statistics hold no such sum.

    >>> parse_moment("s(1, 0, 2)")
    Moment(b=1, alpha=0, beta=2)
    """
    written = _WRITTEN.fullmatch(text)
    if written is None:
        return None
    b, alpha, beta = map(int, written.groups())
    if (alpha, beta) not in SUMS:
        raise UserError(
            f"{text} needs the sum of g^{alpha} ||f||^{beta} over an expert's tokens, which no statistics hold",
            hint=f"the pairs alpha,beta are: {' '.join(f'{a},{b}' for a, b in SUMS)}",
        )
    return Moment(b, alpha, beta)
