"""Whether a router can work with what is kept: checked before any work, with the nearest plan that it can.

Group-limited routing (DeepSeek-V2/V3) splits the experts into ``count`` runs of equal length, scores a group by its
best expert or by the sum of its two best, lets ``selected`` groups through and picks K experts inside them. Pruning
leaves runs of unequal length. Rows are never moved between groups, so what "the dropped experts are unselectable" means
stays exact, with two limits:

1. Where two experts score a group, one with one survivor is scored below every group with two. If such groups would
   have to compete with each other for a place, their order is not defined by the original model, and the plan is
   refused.
2. Whichever groups get through, they must hold at least K survivors between them.
"""

import dataclasses
from collections.abc import Sequence

from moe_spec.errors import UserError
from moe_spec.record import Record


@dataclasses.dataclass(frozen=True)
class Groups:
    """Group-limited routing: ``selected`` of ``count`` groups get through (``topk_group`` of ``n_group``).

    A group is scored by the sum of its ``scored_by`` best experts: 2 in DeepSeek-V3, 1 in DeepSeek-V2.
    """

    count: int
    selected: int
    scored_by: int = 2

    @classmethod
    def from_record(cls, record: Record | None) -> "Groups | None":
        """Read what stands in plans and statistics; None for a router without groups."""
        if record is None:
            return None
        return cls(record.take("count", int), record.take("selected", int), record.take("scored_by", int, default=2))

    def survivors(self, keep: Sequence[int], experts: int) -> list[int]:
        """How many of ``keep`` each group holds.

        >>> Groups(2, 1).survivors((0, 1, 5), experts=8)
        [2, 1]
        """
        width = experts // self.count
        return [sum(expert // width == group for expert in keep) for group in range(self.count)]


def check_keep(layer: str, experts: int, top_k: int, keep: Sequence[int], groups: Groups | None = None) -> None:
    """Refuse a keep list that a router over ``experts`` experts cannot work with.

    Raises:
        UserError: ids out of order, repeated or out of range; K below 1 or above the survivors; groups that cannot
            be, or that break rule 1 or 2.
    """
    if list(keep) != sorted(set(keep)) or (keep and not 0 <= keep[0] <= keep[-1] < experts):
        raise UserError(
            f"layer {layer} keeps {list(keep)}, expected ascending, distinct ids from 0 to {experts - 1}",
            hint="make the plan anew with `moe-edge plan`",
        )
    if top_k < 1:
        raise UserError(
            f"layer {layer} selects K={top_k} experts, expected at least 1", hint="give it a K of 1 or more"
        )
    if not keep:
        raise UserError(f"layer {layer} keeps no expert", hint="keep at least 1 expert a layer: --keep 1")
    if len(keep) < top_k:
        raise UserError(
            f"layer {layer} keeps {len(keep)} of {experts} experts, but its router selects K={top_k} a token",
            hint=f"keep at least {top_k}: --keep {top_k}; or let K shrink with the layer: --clamp-top-k",
        )
    if groups is not None:
        _check_groups(layer, experts, top_k, keep, groups)


def _check_groups(layer: str, experts: int, top_k: int, keep: Sequence[int], groups: Groups) -> None:
    if groups.count < 1 or experts % groups.count or not 1 <= groups.selected <= groups.count:
        raise UserError(
            f"layer {layer} cannot route {experts} experts in {groups.count} groups of which {groups.selected} are "
            "selected",
            hint="make the plan anew with `moe-edge plan`",
        )
    survivors = groups.survivors(keep, experts)
    scored = sum(count >= groups.scored_by for count in survivors)
    single = sum(0 < count < groups.scored_by for count in survivors)
    ambiguous = scored < groups.selected < scored + single
    # the fewest survivors that any admissible choice of groups lets through
    certain = [count for count in survivors if 0 < count < groups.scored_by] if groups.selected > scored else []
    chosen = sorted(count for count in survivors if count >= groups.scored_by)[: groups.selected] + certain
    if not ambiguous and sum(chosen) >= top_k:
        return
    per_group = max(groups.scored_by, round(len(keep) / groups.count), -(-top_k // groups.selected))
    raise UserError(
        f"layer {layer} keeps {survivors} experts in its {groups.count} routing groups, of which {groups.selected} "
        f"{'is' if groups.selected == 1 else 'are'} selected for K={top_k}: the router cannot choose among them",
        hint=f"keep the same number in every group; the nearest such plan is --keep {per_group * groups.count}",
    )
