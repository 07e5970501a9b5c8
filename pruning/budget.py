"""How many experts each layer keeps, and which: a budget spent on ranked layers."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError, did_you_mean
from moe_spec.feasibility import ANY, Groups, Kernels, check_expert_choice, check_floor, check_keep
from moe_spec.plan import DROP_ROUTERS, ROWS, UNTOUCHED, LayerPlan

Keep = int | float
"""An int is how many experts a layer keeps; a float is the share of them that it keeps, above 0 and at most 1."""


Holds = Callable[[Sequence[int]], bool]
"""Whether a budget has room for so many experts of each layer; it has for fewer if it has for more."""


def parse_keep(text: str) -> Keep:
    """``--keep`` as people write it: a whole number is a count, anything with a point or a percent sign a share.

    Raises:
        UserError: neither a count from 1 nor a share above 0 and at most 1.

    >>> parse_keep("3"), parse_keep("0.5"), parse_keep("50%"), parse_keep("1"), parse_keep("1.0")
    (3, 0.5, 0.5, 1, 1.0)
    """
    keep: Keep
    try:
        if text.isdecimal():
            keep = int(text)
        elif text.endswith("%"):
            keep = float(text[:-1]) / 100
        else:
            keep = float(text)
    except ValueError:
        keep = math.nan
    return check_budget(keep, text)


def check_budget(keep: Keep, written: str) -> Keep:
    """``keep`` if it is a count from 1 or a share above 0 and at most 1; ``written`` is how the user put it.

    Raises:
        UserError: it is neither.
    """
    if keep >= 1 if isinstance(keep, int) else 0 < keep <= 1:
        return keep
    raise UserError(
        f"--keep {written} is neither a count of experts nor a share of them",
        hint="give a whole number from 1, like --keep 4, or a share above 0 and at most 1, like --keep 0.5 or 50%",
    )


def check_router(router: str, *, clamp_top_k: bool) -> None:
    """Refuse what cannot become of a router that loses experts.

    Raises:
        UserError: none of ``DROP_ROUTERS``, or a K that shall shrink under a router that stays as it is.
    """
    if router not in DROP_ROUTERS:
        raise UserError(
            f"{router!r} is no router of a plan that drops experts", hint=did_you_mean(router, DROP_ROUTERS)
        )
    check_clamp(router, clamp_top_k=clamp_top_k)


def check_clamp(router: str, *, clamp_top_k: bool) -> None:
    """Refuse to let K shrink under a router that stays as it is.

    Raises:
        UserError: it shall.
    """
    if router in UNTOUCHED and clamp_top_k:
        raise UserError(
            f"--clamp-top-k lets K shrink, but --router {router} leaves it as it is",
            hint=f"leave out one of the two: with --router {router} fewer than K experts may be kept as it is",
        )


@dataclasses.dataclass(frozen=True)
class RankedLayer:
    """One MoE layer and what a criterion gave its experts.

    Attributes:
        name: path of the MoE block.
        top_k: K.
        groups: group-limited routing, if the layer has it.
        scores: (E,) float64, higher is kept.
        clamp_top_k: let K shrink to what the router can then select.
        router: one of ``moe_spec.plan.DROP_ROUTERS``. With those ``UNTOUCHED`` K stays, and any number may be kept.
        protected: ids that are kept before all others.
        floor: the layer keeps at least so many.
        kernels: what the target takes.
        expert_choice: experts choose their tokens.
    """

    name: str
    top_k: int
    groups: Groups | None
    scores: npt.NDArray[np.float64]
    clamp_top_k: bool = False
    router: str = ROWS
    protected: frozenset[int] = frozenset()
    floor: int = 1
    kernels: Kernels = ANY
    expert_choice: bool = False

    @property
    def experts(self) -> int:
        """E."""
        return len(self.scores)

    @property
    def bound_by(self) -> Groups | None:
        """The routing groups that survivors have to fill; a router that stays as it is binds nothing."""
        return None if self.router in UNTOUCHED else self.groups

    @property
    def step(self) -> int:
        """By how many experts the layer grows: one of every routing group."""
        return 1 if self.bound_by is None else self.bound_by.count

    @property
    def fewest(self) -> int:
        """How many experts have to stay so that the protected ones do."""
        width = self.experts // self.step
        return self.step * max(sum(e // width == group for e in self.protected) for group in range(self.step))

    def best(self, count: int) -> tuple[int, ...]:
        """Ids of the ``count`` best experts, ascending; the same number of every group, unless only one stays.

        Protected experts come first, then higher scores, then lower ids.
        """
        last_E = ~np.isin(np.arange(self.experts), list(self.protected))
        if count % self.step:
            assert count == 1, "groups keep the same number of experts each"
            return (int(np.lexsort((-self.scores, last_E))[0]),)
        ranked_GE = np.lexsort((-self.scores.reshape(self.step, -1), last_E.reshape(self.step, -1)), axis=1)
        first_of_group_G1 = np.arange(self.step)[:, np.newaxis] * (self.experts // self.step)
        kept = (ranked_GE + first_of_group_G1)[:, : count // self.step]
        return tuple(sorted(kept.flatten().tolist()))

    def count(self, keep: Keep) -> int:
        """How many experts ``keep`` means here.

        A share is rounded half up, is at least the floor, and where kernels take certain numbers only, the nearest
        that works, of two equally near the larger. A count is meant as it is.

        Raises:
            UserError: more experts than the layer has, kept or as the floor.
        """
        check_floor(self.name, self.experts, self.floor)
        if isinstance(keep, float):
            count = math.floor(keep * self.experts + 0.5 + 1e-9)  # 0.35 x 10 may come out a hair below 3.5
            nearest = self._nearest(count, 1) if self.kernels.counts else []
            return nearest[0] if nearest else max(self.floor, count)
        if keep > self.experts:
            raise UserError(
                f"--keep {keep} asks for {keep} experts, but layer {self.name} has {self.experts}",
                hint=f"keep at most {self.experts}: --keep {self.experts}",
            )
        return keep

    def top_k_after(self, count: int) -> int:
        """K once ``count`` experts are left; when clamped at most what the router can then select."""
        if not self.clamp_top_k:
            return self.top_k
        groups = self.bound_by
        reachable = count if groups is None else max(1, count // groups.count * groups.selected)
        return min(self.top_k, reachable)

    def plan(self, count: int) -> LayerPlan:
        """Keep the ``count`` best.

        Raises:
            UserError: the router cannot work with so many, the target does not take them, the floor is higher, or more
                are protected.
        """
        if count < self.fewest:
            raise UserError(
                f"layer {self.name} keeps {count} of {self.experts} experts, but {sorted(self.protected)} are "
                f"protected, for which it has to keep {self.fewest}",
                hint=f"keep more: --keep {self.fewest}; or plan without --protect",
            )
        if self.expert_choice:
            check_expert_choice(self.name, count, full=self.router in UNTOUCHED)
        if count < self.floor:
            raise UserError(
                f"layer {self.name} keeps {count} of {self.experts} experts, the floor is {self.floor}",
                hint=f"keep more: --keep {self.floor}; or a lower --floor",
            )
        nearest = [] if self.kernels.take(count) else self._nearest(count, 2)
        self.kernels.check(self.name, count, self.top_k_after(count), nearest)
        if self.bound_by is not None:
            self._check_groups(self.bound_by, count)
        scores = tuple(self.scores.tolist())
        top_k = self.top_k_after(count)
        return LayerPlan(self.name, self.experts, top_k, self.best(count), scores, self.groups, self.router)

    def legal_counts(self) -> list[int]:
        """The counts that router, floor and target can work with, ascending."""
        return [count for count in sorted({1, *range(self.step, self.experts + 1, self.step)}) if self._works(count)]

    def levels(self) -> list[int]:
        """The counts between which a layer can change by whole steps, so that all protected experts stay; ascending.

        Raises:
            UserError: there is none.
        """
        check_floor(self.name, self.experts, self.floor)
        levels = [n for n in self.legal_counts() if n % self.step == 0 and n >= self.fewest]
        if not levels:
            self.plan(self.experts)  # says why not even all of them will do
        return levels

    def _nearest(self, count: int, how_many: int) -> list[int]:
        """The legal counts nearest to ``count``, ascending."""
        return sorted(sorted(self.legal_counts(), key=lambda other: (abs(other - count), -other))[:how_many])

    def _works(self, count: int) -> bool:
        if count < self.floor or not self.kernels.take(count):
            return False
        top_k = 1 if self.router in UNTOUCHED else self.top_k_after(count)
        try:
            if self.expert_choice:
                check_expert_choice(self.name, count, full=self.router in UNTOUCHED)
            check_keep(self.name, self.experts, top_k, self.best(count), self.bound_by)
        except UserError:
            return False
        return True

    def _check_groups(self, groups: Groups, count: int) -> None:
        if count in self.legal_counts():
            return
        nearest = self._nearest(count, 2)
        raise UserError(
            f"layer {self.name} keeps {count} of {self.experts} experts, but its router selects K={self.top_k} from "
            f"{groups.selected} of {groups.count} groups: every group must keep the same number, and enough of them",
            hint=f"the nearest that works: {' or '.join(f'--keep {other}' for other in nearest)}",
        )


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
"""A scope that starts from all of these and tries others on data (``pruning.evolution``)."""
