"""One MoE layer whose experts are ranked: how many it may keep, and which these are."""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError
from moe_spec.feasibility import ANY, Groups, Kernels, check_expert_choice, check_floor, check_keep
from moe_spec.layer_plan import ROWS, UNTOUCHED, LayerPlan
from pruning.budget.keep import Keep


@dataclasses.dataclass(frozen=True)
class RankedLayer:
    """One MoE layer and what a criterion gave its experts.

    Attributes:
        name: path of the MoE block.
        top_k: K.
        groups: group-limited routing, if the layer has it.
        scores: (E,) float64, higher is kept.
        clamp_top_k: let K shrink to what the router can then select.
        router: one of ``DROP_ROUTERS``. With those ``UNTOUCHED`` K stays, and any number may be kept.
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
