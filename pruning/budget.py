"""How many experts each layer keeps, and which: a budget spent on ranked layers."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups, check_keep
from moe_spec.plan import LayerPlan

Keep = int | float
"""An int is how many experts a layer keeps; a float is the share of them that it keeps, above 0 and at most 1."""


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


@dataclasses.dataclass(frozen=True)
class RankedLayer:
    """One MoE layer and what a criterion gave its experts.

    Attributes:
        name: path of the MoE block.
        top_k: K.
        groups: group-limited routing, if the layer has it.
        scores: (E,) float64, not negative, higher is kept.
    """

    name: str
    top_k: int
    groups: Groups | None
    scores: npt.NDArray[np.float64]

    @property
    def experts(self) -> int:
        """E."""
        return len(self.scores)

    @property
    def step(self) -> int:
        """By how many experts the layer grows: one of every routing group."""
        return 1 if self.groups is None else self.groups.count

    def best(self, count: int) -> tuple[int, ...]:
        """Ids of the ``count`` best experts, ascending; the same number of every group, unless only one stays."""
        if count % self.step:
            assert count == 1, "groups keep the same number of experts each"
            return (int(self.scores.argmax()),)
        ranked_GE = np.argsort(-self.scores.reshape(self.step, -1), axis=1, kind="stable")  # ties: the lower id first
        first_of_group_G1 = np.arange(self.step)[:, np.newaxis] * (self.experts // self.step)
        kept = (ranked_GE + first_of_group_G1)[:, : count // self.step]
        return tuple(sorted(kept.flatten().tolist()))

    def count(self, keep: Keep) -> int:
        """How many experts ``keep`` means here: a share is rounded half up, and is at least one.

        Raises:
            UserError: more experts than the layer has.
        """
        if isinstance(keep, float):
            return max(1, math.floor(keep * self.experts + 0.5 + 1e-9))  # 0.35 x 10 may come out a hair below 3.5
        if keep > self.experts:
            raise UserError(
                f"--keep {keep} asks for {keep} experts, but layer {self.name} has {self.experts}",
                hint=f"keep at most {self.experts}: --keep {self.experts}",
            )
        return keep

    def top_k_after(self, count: int, clamp: bool) -> int:
        """K once ``count`` experts are left; with ``clamp`` at most what the router can then select."""
        if not clamp:
            return self.top_k
        reachable = count if self.groups is None else max(1, count // self.groups.count * self.groups.selected)
        return min(self.top_k, reachable)

    def plan(self, count: int, clamp: bool) -> LayerPlan:
        """Keep the ``count`` best.

        Raises:
            UserError: the router cannot work with so many.
        """
        top_k = self.top_k_after(count, clamp)
        if self.groups is not None:
            self._check_groups(self.groups, count, clamp)
        keep, scores = self.best(count), tuple(self.scores.tolist())
        return LayerPlan(self.name, self.experts, top_k, keep, scores, self.groups)

    def legal_counts(self, clamp: bool) -> list[int]:
        """The counts that the router can work with, ascending."""
        return [
            count for count in sorted({1, *range(self.step, self.experts + 1, self.step)}) if self._works(count, clamp)
        ]

    def _works(self, count: int, clamp: bool) -> bool:
        try:
            check_keep(self.name, self.experts, self.top_k_after(count, clamp), self.best(count), self.groups)
        except UserError:
            return False
        return True

    def _check_groups(self, groups: Groups, count: int, clamp: bool) -> None:
        legal = self.legal_counts(clamp)
        if count in legal:
            return
        nearest = sorted(sorted(legal, key=lambda other: abs(other - count))[:2])
        raise UserError(
            f"layer {self.name} keeps {count} of {self.experts} experts, but its router selects K={self.top_k} from "
            f"{groups.selected} of {groups.count} groups: every group must keep the same number, and enough of them",
            hint=f"the nearest that works: {' or '.join(f'--keep {other}' for other in nearest)}",
        )


def same_count(layers: Sequence[RankedLayer], keep: Keep, _clamp: bool) -> list[int]:
    """Scope ``layer``: every layer keeps ``keep`` of its own experts."""
    return [layer.count(keep) for layer in layers]


def one_ranking(layers: Sequence[RankedLayer], keep: Keep, clamp: bool) -> list[int]:
    """Scope ``global``: as many experts in all as scope ``layer`` keeps, but spent where the scores are highest.

    Each layer gets its floor first: K, or 1 with ``clamp``; with routing groups the smallest number that works. The
    rest goes to the best of all layers. Scores are divided by their layer's sum, because norms grow with depth. Ties:
    the earlier layer, then the lower id. Layers with groups grow by one expert of every group, ranked by their mean.

    Raises:
        UserError: the floors exceed the budget, or groups cannot spend it to the last expert.
    """
    budget = sum(layer.count(keep) for layer in layers)
    counts = [min(n for n in layer.legal_counts(clamp) if n % layer.step == 0) for layer in layers]
    if sum(counts) > budget:
        raise UserError(
            f"--keep {keep} leaves {budget} experts for {len(layers)} layers, which need at least {sum(counts)}",
            hint=f"keep more: --keep {max(counts)}" + ("" if clamp else "; or let K shrink: --clamp-top-k"),
        )
    left = budget - sum(counts)
    for _, index in sorted(_growth(layers, counts)):
        if layers[index].step <= left:
            counts[index] += layers[index].step
            left -= layers[index].step
    if left:
        step = max(layer.step for layer in layers)
        raise UserError(
            f"--keep {keep} asks for {budget} experts in all, but routing groups let {budget - left} be kept",
            hint=f"keep a multiple of {step}, the number of groups, in every layer",
        )
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


SCOPES: Mapping[str, Callable[[Sequence[RankedLayer], Keep, bool], list[int]]] = {
    "layer": same_count,
    "global": one_ranking,
}
"""How a budget is spread over layers."""
