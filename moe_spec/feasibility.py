"""Whether a router can work with what is kept: checked before any work, with the nearest plan that it can.

Group-limited routing (DeepSeek-V2/V3) splits the experts into ``count`` runs of equal length, scores a group by its
best expert or by the sum of its two best, lets ``selected`` groups through and picks K experts inside them. Pruning
leaves runs of unequal length. Rows are never moved between groups, so what "the dropped experts are unselectable" means
stays exact, with two limits:

1. Where two experts score a group, one with one survivor is scored below every group with two. If such groups would
   have to compete with each other for a place, their order is not defined by the original model, and the plan is
   refused.
2. Whichever groups get through, they must hold at least K survivors between them.

A target's kernels may be built for certain numbers of experts only (``Kernels``).
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


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What the kernels of a target take; the default is: anything.

    Attributes:
        target: its name.
        counts: how many experts a layer may have, ascending; empty where any number does.
        max_top_k: the largest K; None where any does.
    """

    target: str = ""
    counts: tuple[int, ...] = ()
    max_top_k: int | None = None

    def take(self, count: int) -> bool:
        """Whether a layer may have ``count`` experts.

        >>> Kernels().take(96), Kernels("edge-llm-fp16", (128, 256)).take(96)
        (True, False)
        """
        return not self.counts or count in self.counts

    def check(self, layer: str, count: int, top_k: int, nearest: Sequence[int] = ()) -> None:
        """Refuse a layer that the kernels do not take; ``nearest`` are counts that could be kept instead.

        Raises:
            UserError: too many selected, or a number of experts that is none of ``counts``.
        """
        if self.max_top_k is not None and top_k > self.max_top_k:
            raise UserError(
                f"layer {layer} selects K={top_k} experts a token, target {self.target} takes at most {self.max_top_k}",
                hint="choose another --target",
            )
        if not self.take(count):
            others = " or ".join(f"--keep {other}" for other in nearest)
            raise UserError(
                f"layer {layer} keeps {count} experts, target {self.target} takes {' or '.join(map(str, self.counts))}",
                hint=f"the nearest that works: {others}" if nearest else "choose another --target",
            )


ANY = Kernels()
"""Kernels that take any number of experts."""


def check_floor(layer: str, experts: int, floor: int) -> None:
    """Refuse a floor that a layer of ``experts`` experts cannot have.

    Raises:
        UserError: it is below 1 or above ``experts``.
    """
    if not 1 <= floor <= experts:
        raise UserError(
            f"--floor {floor} asks for {floor} experts, but layer {layer} has {experts}",
            hint=f"give --floor 1 to {experts}",
        )


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


def check_expert_choice(layer: str, kept: int, *, full: bool) -> None:
    """Refuse what cannot become of a layer whose experts choose their tokens.

    Raises:
        UserError: one expert stays, to which every token is as good as another, for a softmax over one is 1; or rows
            of experts that go shall stay.
    """
    if full:
        raise UserError(
            f"in layer {layer} experts choose their tokens: an expert that goes chooses none, so its row goes too",
            hint="plan with --router rows",
        )
    if kept == 1:
        raise UserError(
            f"layer {layer} keeps 1 expert, which would choose tokens by a softmax that is 1 for all of them",
            hint="keep at least 2: --keep 2",
        )
