"""Scopes: how a budget is spread over ranked layers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_spec.errors import UserError
from moe_spec.layer_plan import UNTOUCHED
from pruning.budget.keep import Keep
from pruning.budget.ranked import RankedLayer

Holds = Callable[[Sequence[int]], bool]
"""Whether a budget has room for so many experts of each layer; it has for fewer if it has for more."""


def same_count(layers: Sequence[RankedLayer], keep: Keep) -> list[int]:
    """Scope ``layer``: every layer keeps ``keep`` of its own experts.

    Raises:
        UserError: a layer that cannot keep so many.
    """
    counts = [layer.count(keep) for layer in layers]
    for layer, count in zip(layers, counts, strict=True):
        layer.plan(count)
    return counts


def smallest_counts(layers: Sequence[RankedLayer], keep: Keep) -> list[int]:
    """What scope ``global`` gives each layer first: K, or 1 where K may shrink or the router stays as it is.

    With routing groups it is the smallest number that works; it is never below the number of protected experts.

    Raises:
        UserError: that is more than ``keep`` allows in all.
    """
    budget = sum(layer.count(keep) for layer in layers)
    counts = [layer.levels()[0] for layer in layers]
    if sum(counts) > budget:
        may_shrink = any(layer.clamp_top_k or layer.router in UNTOUCHED for layer in layers)
        raise UserError(
            f"--keep {keep} leaves {budget} experts for {len(layers)} layers, which need at least {sum(counts)}",
            hint=f"keep more: --keep {max(counts)}" + ("" if may_shrink else "; or let K shrink: --clamp-top-k"),
        )
    return counts


def one_ranking(layers: Sequence[RankedLayer], keep: Keep) -> list[int]:
    """Scope ``global``: as many experts in all as scope ``layer`` keeps, but spent where the scores are highest.

    Each layer gets its smallest count first, the rest goes to the best of all layers. Scores are divided by their
    layer's sum, because norms grow with depth; counts and gate masses sum to the same in every layer anyway. Ties: the
    earlier layer, then the lower id. Layers with groups grow by one expert of every group, ranked by their mean.

    Raises:
        UserError: scores below 0, which have no share in a sum; the smallest counts exceed the budget, or groups
            cannot spend it to the last expert.
    """
    smallest_counts(layers, keep)
    budget = sum(layer.count(keep) for layer in layers)
    counts = best_of_all(layers, lambda counts: sum(counts) <= budget)
    left = budget - sum(counts)
    if left:
        step = max(layer.step for layer in layers)
        raise UserError(
            f"--keep {keep} asks for {budget} experts in all, but routing groups let {budget - left} be kept",
            hint=f"keep a multiple of {step}, the number of groups, in every layer",
        )
    return counts


def most_of_each(layers: Sequence[RankedLayer], holds: Holds) -> list[int]:
    """Scope ``layer`` where a budget is no count: as many of each layer as it holds.

    A layer that cannot keep that number keeps the next lower that it can, or the fewest that it can.
    """
    levels = [layer.levels() for layer in layers]
    for most in sorted({count for of_layer in levels for count in of_layer}, reverse=True):
        counts = [max((n for n in of_layer if n <= most), default=of_layer[0]) for of_layer in levels]
        if holds(counts):
            break
    return counts


def best_of_all(layers: Sequence[RankedLayer], holds: Holds) -> list[int]:
    """Scope ``global``: every layer gets the fewest that it can keep, and grows by its best where the budget holds it.

    Raises:
        UserError: scores below 0, which have no share in a sum.
    """
    for layer in layers:
        if layer.scores.min() < 0:
            raise UserError(
                f"layer {layer.name} has scores below 0, which say nothing across layers",
                hint="plan with --scope layer",
            )
    counts = [layer.levels()[0] for layer in layers]
    for _, index in sorted(_growth(layers, counts)):
        counts[index] += layers[index].step
        if not holds(counts):
            counts[index] -= layers[index].step
    return counts


def _growth(layers: Sequence[RankedLayer], counts: Sequence[int]) -> list[tuple[float, int]]:
    """For every step that a layer can grow beyond ``counts``: minus the mean share of its new experts, the layer."""
    steps = []
    for index, (layer, start) in enumerate(zip(layers, counts, strict=True)):
        share_E = layer.scores / max(layer.scores.sum(), np.finfo(np.float64).tiny)
        for count in range(start, layer.experts, layer.step):
            new = set(layer.best(count + layer.step)) - set(layer.best(count))
            steps.append((-float(share_E[sorted(new)].mean()), index))
    return steps


@dataclasses.dataclass(frozen=True)
class Scope:
    """One way to spread a budget over layers.

    Attributes:
        spread: how many experts each layer keeps. What it refuses, it refuses whatever the scores, negative ones aside.
        within: the same where the budget is no count of experts; the fewest of all layers are within it.
    """

    spread: Callable[[Sequence[RankedLayer], Keep], list[int]]
    within: Callable[[Sequence[RankedLayer], Holds], list[int]]


SCOPES: Mapping[str, Scope] = {
    "layer": Scope(spread=same_count, within=most_of_each),
    "global": Scope(spread=one_ranking, within=best_of_all),
}
"""How a budget is spread over layers."""

SEARCHED = "searched"
"""A scope that starts from all of these and tries others on data (``pruning.budget.evolution``)."""
