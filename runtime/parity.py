"""How close two models are: pure functions over arrays.

T tokens, E experts of the source model, R rows of an output (everything but the last axis), V its last axis.
"""

from __future__ import annotations  # Python 3.8: this file travels to devices, see runtime/bundle

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_TINY = 1e-30
_NO_SCORE = 1e20
"""Beyond it a number says that an expert cannot be selected."""

TOLD_APART = 16
"""Tokens that must rank an expert before its scores are told from those of others."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router did with T tokens, by the source model's expert ids.

    Attributes:
        gates: (T, E) weight of each expert, 0 where it was not selected.
        scores: (T, E or more) what top-k ranked, -inf where an expert could not be selected; behind it that of rows
            of the router that lead to no expert.
    """

    gates: Floats
    scores: Floats

    @classmethod
    def of(cls, gates_Tk: npt.NDArray[Any], scores_Tk: npt.NDArray[Any], keep: Sequence[int], experts: int) -> Routing:
        """Spread a graph's own experts, of which number j is ``keep[j]``, over the ids 0 to ``experts`` - 1.

        >>> Routing.of(np.array([[0.0, 1.0]]), np.array([[0.2, 0.8]]), keep=(0, 2), experts=3)
        Routing(gates=array([[0., 0., 1.]]), scores=array([[ 0.2, -inf,  0.8]]))
        """
        gates = np.zeros((len(gates_Tk), experts))
        scores = np.full((len(gates_Tk), experts), -np.inf)
        gates[:, list(keep)], scores[:, list(keep)] = gates_Tk, scores_Tk[:, : len(keep)]
        return cls(gates, np.hstack([scores, scores_Tk[:, len(keep) :]]))

    @classmethod
    def of_one_expert(cls, tokens: int, keep: Sequence[int], experts: int) -> Routing:
        """A layer without a router: every token goes to its one expert with gate 1."""
        return cls.of(np.ones((tokens, 1)), np.ones((tokens, 1)), keep, experts)


@dataclasses.dataclass(frozen=True)
class TokenParity:
    """Two routers on the same T tokens; every array is (T,).

    Attributes:
        flipped: the sets of selected experts differ.
        agreement: size of the sets' intersection over that of their union (Jaccard).
        margin: relative margin of the reference's choice (``selection_margin``).
        weight: largest gate, on either side, of an expert that only one side selected.
        gate_error: largest difference of a gate, over the reference's largest gate.
    """

    flipped: Flags
    agreement: Floats
    margin: Floats
    weight: Floats
    gate_error: Floats


def compare_routing(reference: Routing, candidate: Routing, top_k: int) -> TokenParity:
    """Token by token; ``top_k`` is the reference's K."""
    mine, theirs = reference.gates != 0, candidate.gates != 0
    differs = mine != theirs  # NaN counts as selected
    union = (mine | theirs).sum(axis=1)
    largest = np.nan_to_num(np.maximum(np.abs(reference.gates), np.abs(candidate.gates)), nan=np.inf)
    error = np.nan_to_num(np.abs(reference.gates - candidate.gates), nan=np.inf).max(axis=1, initial=0.0)
    return TokenParity(
        flipped=differs.any(axis=1),
        agreement=(mine & theirs).sum(axis=1) / np.maximum(union, 1) + (union == 0),
        margin=selection_margin(reference.scores, top_k),
        weight=np.where(differs, largest, 0.0).max(axis=1, initial=0.0),
        gate_error=error / max(float(np.abs(reference.gates).max(initial=0.0)), _TINY),
    )


class ScoreMatch:
    """Whose scores each expert of the candidate has, of all tokens so far.

    Rounding moves scores a little, and in no direction; a router row in the wrong place gives an expert the scores of
    another. That shows in any number format, where margins prove nothing: of many experts in 4 bits, few tokens have a
    margin that rounding does not explain. What all experts or all tokens have in common is left out: shifts of logits.
    """

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: list[Any] = [0.0] * 6

    def add(self, reference: Routing, candidate: Routing) -> None:
        """Take in the same tokens of both."""
        experts = reference.gates.shape[1]
        mine, theirs = (_logits(side.scores[:, :experts]) for side in (reference, candidate))
        both = np.isfinite(mine) & np.isfinite(theirs)
        mine, theirs = _centred(mine, both), _centred(theirs, both)
        added = [array.sum(axis=0) for array in (both, mine, theirs, mine**2, theirs**2)]
        self._sums = [before + now for before, now in zip(self._sums, [*added, theirs.T @ mine])]  # noqa: B905 - Python 3.8
        self._tokens += len(mine)

    def moved(self) -> dict[int, int]:
        """Experts whose scores are nearer, by half, to those that another should have; and which that is."""
        if self._tokens < TOLD_APART:
            return {}
        seen, *sums = self._sums
        mean, their_mean, square, their_square, product = (array / self._tokens for array in sums)
        variance, their_variance = square - mean**2, their_square - their_mean**2
        # the mean square of what lies between the candidate's scores of an expert (rows) and the reference's of another
        between_EE = their_variance[:, None] + variance - 2 * (product - np.outer(their_mean, mean))
        own_E, told = between_EE.diagonal(), seen >= TOLD_APART
        others_EE = np.where(np.eye(len(own_E), dtype=np.bool_) | ~told, np.inf, between_EE)
        moved = told & (others_EE.min(axis=1) < own_E / 4) & (own_E > variance[told].sum() / max(told.sum(), 1) / 100)
        return {int(expert): int(others_EE[expert].argmin()) for expert in np.flatnonzero(moved)}


def moved_experts(reference: Routing, candidate: Routing) -> dict[int, int]:
    """``ScoreMatch.moved`` of these tokens.

    >>> logits = np.random.default_rng(0).standard_normal((20, 4))
    >>> mine, theirs = (Routing(np.zeros((20, 4)), scores) for scores in (logits, logits[:, [0, 2, 1, 3]]))
    >>> moved_experts(mine, theirs)
    {1: 2, 2: 1}
    """
    match = ScoreMatch()
    match.add(reference, candidate)
    return match.moved()


def say_moved(moved: Mapping[int, int]) -> str:
    """In words.

    >>> say_moved({1: 2, 2: 1})
    'scores expert 1 as expert 2, expert 2 as expert 1 should be'
    """
    return f"scores {', '.join(f'expert {expert} as expert {other}' for expert, other in moved.items())} should be"


def _logits(scores_TE: Floats) -> Floats:
    """Up to a shift for each token, and NaN where an expert cannot be selected: logarithms of probabilities."""
    ranked = np.where(np.abs(scores_TE) < _NO_SCORE, scores_TE, np.nan)
    return ranked if (ranked < 0).any() else np.log(np.where(ranked > 0, ranked, np.nan))


def _centred(logits_TE: Floats, used_TE: Flags) -> Floats:
    """Without each token's mean of those that are used; 0 where they are not."""
    used = np.where(used_TE, logits_TE, 0.0)
    means_T = used.sum(axis=1) / np.maximum(used_TE.sum(axis=1), 1)
    return np.where(used_TE, used - means_T[:, None], 0.0)


def slots_of(gates_TE: npt.NDArray[Any], top_k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Ids and weights (T, K) that say the same as gates: those that are not 0 first.

    >>> slots_of(np.array([[0.0, 0.4, 0.0, 0.6]]), top_k=3)
    (array([[3, 1, 0]]), array([[0.6, 0.4, 0. ]], dtype=float32))
    """
    ids_TK = np.argsort(-np.abs(gates_TE), axis=1, kind="stable")[:, :top_k]
    return ids_TK, np.take_along_axis(gates_TE, ids_TK, axis=1).astype(np.float32)


def selection_margin(scores_TE: Floats, top_k: int) -> Floats:
    """``(s_k - s_{k+1}) / scale`` (T,), over what is selectable; infinite where there was no choice.

    Probabilities are exact relative to themselves: their scale is ``|s_k|``. Logits, told by a negative one, are exact
    relative to their kind: their scale is the mean magnitude of the token's logits, where that is larger.

    What group-limited routing excluded has score -inf, so the margin between groups is not seen here: a flip that
    comes from a change of group is judged by the margin inside the group.

    >>> selection_margin(np.array([[4.0, 1.0, 2.0], [4.0, 1.0, -np.inf]]), top_k=2)
    array([0.5, inf])
    >>> selection_margin(np.array([[5.0, 0.01, -0.99]]), top_k=2)
    array([0.5])
    """
    ranked = -np.sort(-scores_TE, axis=1)
    margins = np.full(len(ranked), np.inf)
    if ranked.shape[1] <= top_k:
        return margins
    finite = np.isfinite(ranked)
    choice = finite[:, top_k]
    last, next_one = ranked[choice, top_k - 1], ranked[choice, top_k]
    scale = np.abs(last)
    if ranked[finite].min(initial=0.0) < 0:
        magnitudes = np.abs(np.where(finite, ranked, 0.0)).sum(axis=1) / np.maximum(finite.sum(axis=1), 1)
        scale = np.maximum(scale, magnitudes[choice])
    margins[choice] = (last - next_one) / np.maximum(scale, _TINY)
    return margins


def paired_interval(lost: int, gained: int, examples: int) -> tuple[float, float]:
    """The 95 % confidence interval of ``(gained - lost) / examples``, of two models on the same examples.

    Only examples that one of the two gets right count. Half an example is added to each cell of the table of both, so
    that few examples prove little (Agresti and Min, https://doi.org/10.1002/sim.1781).

    >>> low, high = paired_interval(lost=10, gained=0, examples=1000)
    >>> round(low, 4), round(high, 4)
    (-0.0164, -0.0035)
    """
    total, change, discordant = examples + 2, gained - lost, gained + lost + 1
    half = 1.959964 * math.sqrt(discordant - change * change / total) / total
    return max(change / total - half, -1.0), min(change / total + half, 1.0)


def softmax(logits_RV: Floats) -> Floats:
    """Along the last axis."""
    powers = np.exp(logits_RV - logits_RV.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def kl_divergence(reference_RV: Floats, candidate_RV: Floats) -> Floats:
    """``KL(reference || candidate)`` (R,) in nats, of two tables of probabilities.

    >>> kl_divergence(np.array([[0.5, 0.5]]), np.array([[0.5, 0.5]]))
    array([0.])
    """
    ratio = np.log(np.maximum(reference_RV, _TINY)) - np.log(np.maximum(candidate_RV, _TINY))
    return np.asarray((reference_RV * ratio).sum(axis=-1))


def esap(reference_RV: Floats, candidate_RV: Floats) -> Floats:
    """Expected acceptance ``sum_v min(p_v, q_v)`` (R,): 1 is identical (EvoESAP's fitness).

    >>> esap(np.array([[0.7, 0.3]]), np.array([[0.5, 0.5]]))
    array([0.8])
    """
    return np.asarray(np.minimum(reference_RV, candidate_RV).sum(axis=-1))


def cosine(reference_RV: Floats, candidate_RV: Floats) -> Floats:
    """Cosine (R,) of the angle between rows; 1 where both are zero.

    >>> cosine(np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 2.0], [0.0, 0.0]]))
    array([0., 1.])
    """
    lengths = np.linalg.norm(reference_RV, axis=-1) * np.linalg.norm(candidate_RV, axis=-1)
    both_zero = ~(reference_RV.any(axis=-1) | candidate_RV.any(axis=-1))
    return np.where(both_zero, 1.0, (reference_RV * candidate_RV).sum(axis=-1) / np.maximum(lengths, _TINY))


def same_top1(reference_RV: Floats, candidate_RV: Floats) -> Flags:
    """Whether the largest entry (R,) is at the same place.

    >>> same_top1(np.array([[1.0, 2.0]]), np.array([[2.0, 1.0]]))
    array([False])
    """
    return np.asarray(reference_RV.argmax(axis=-1) == candidate_RV.argmax(axis=-1))
