"""What a plan says of one MoE layer: who stays, who is merged, and what becomes of the router."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups, check_keep
from moe_spec.means import Means
from moe_spec.record import Json, Record

REMAKE = "make it again with `moe-edge plan`"
"""What mends a plan that cannot be."""

ROWS, FULL, REPLACE, MEAN, NEW, ALIAS = "rows", "full", "replace", "mean", "new", "alias"
ROUTERS: Mapping[str, str] = {
    ROWS: "the rows of dropped experts go: a token that chose one gets its next best survivor",
    FULL: "the router stays as it is: a token that chose a dropped expert gets nothing from it",
    REPLACE: "the router stays as it is: a token that chose a dropped expert gets that one's mean output, gated",
    MEAN: "the row of a survivor is the weighted mean of those merged into it",
    NEW: "all rows are drawn anew, and have to be trained",
    ALIAS: "the router stays as it is: all rows of a group lead to the one expert that it became, and gates add up",
}
"""What becomes of a layer's router."""

DROP_ROUTERS = (ROWS, FULL, REPLACE)
MERGE_ROUTERS = (ROWS, MEAN, NEW, ALIAS)

UNTOUCHED = (FULL, REPLACE, ALIAS)
"""Routers that choose as ever, so that K stays and any number of experts may."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """The parent's experts that become one survivor: their weighted mean.

    Attributes:
        experts: ids of the parent's experts, ascending.
        weights: of each, not negative; they are divided by their sum.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def weighted(self) -> tuple[tuple[float, int], ...]:
        """Weight and id of each expert that counts: those with the weight 0 are not even looked at."""
        pairs = zip(self.weights, self.experts, strict=True)
        return tuple((weight, expert) for weight, expert in pairs if weight)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What happens to one MoE layer.

    Attributes:
        name: path of the MoE block in the model, e.g. ``model.layers.3.mlp``.
        experts: E of the parent model.
        top_k: K once pruned, at most ``len(keep)``.
        keep: ids of the parent's experts that stay, ascending.
        scores: (E,) what the criterion gave; higher is kept.
        groups: the parent's group-limited routing, if it has one.
        router: one of ``ROUTERS``. With those in ``UNTOUCHED``, K is that of the parent, and fewer than K may stay.
        merge: for each of ``keep`` what it becomes the mean of, itself included; empty where experts are dropped.
        align: permute the neurons of merged experts to those of the survivor before they are averaged.
        means_DH: with ``replace``, what each of ``dropped`` gives on average, float32. It is no part of plan.json, and
            None where only that was read.
    """

    name: str
    experts: int
    top_k: int
    keep: tuple[int, ...]
    scores: tuple[float, ...] = ()
    groups: Groups | None = None
    router: str = ROWS
    merge: tuple[Merge, ...] = ()
    align: bool = False
    means_DH: Means | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.router not in (MERGE_ROUTERS if self.merge else DROP_ROUTERS):
            kind = "merges" if self.merge else "drops"
            raise UserError(f"layer {self.name} {kind} experts with the router {self.router!r}", hint=REMAKE)
        if self.router in UNTOUCHED:
            check_keep(self.name, self.experts, 1, self.keep)
        else:
            check_keep(self.name, self.experts, self.top_k, self.keep, self.groups)
        self._check_merge()
        self._check_means()
        if self.scores and len(self.scores) != self.experts:
            raise UserError(f"layer {self.name} has {len(self.scores)} scores for {self.experts} experts", hint=REMAKE)

    def _check_merge(self) -> None:
        """Every survivor is merged from itself and others, no expert twice, with weights that have a sum."""
        if not self.merge:
            return
        ids = [expert for merge in self.merge for expert in merge.experts]
        fits = len(self.merge) == len(self.keep) and len(set(ids)) == len(ids) and set(ids) <= set(range(self.experts))
        fits = fits and (self.router != ALIAS or len(ids) == self.experts)
        fits = fits and all(
            own in merge.experts
            and len(merge.weights) == len(merge.experts)
            and min(merge.weights) >= 0
            and 0 < sum(merge.weights) < math.inf
            for own, merge in zip(self.keep, self.merge, strict=True)
        )
        if not fits:
            raise UserError(
                f"layer {self.name} keeps {list(self.keep)} but merges {[list(merge.experts) for merge in self.merge]}",
                hint="each survivor with itself and others, no expert twice, with the router "
                f"{ALIAS!r} every expert, weights above 0; {REMAKE}",
            )
        if self.groups is not None and self.router != ALIAS:
            self._check_merge_groups(self.groups)

    def _check_merge_groups(self, groups: Groups) -> None:
        """A router with groups finds an expert by its group, so only experts of one group can become one."""
        for merge in self.merge:
            if max(groups.survivors(merge.experts, self.experts)) < len(merge.experts):
                raise UserError(
                    f"layer {self.name} merges experts {list(merge.experts)}, which are of different routing groups",
                    hint=f"merge inside each of the {groups.count} groups; {REMAKE}",
                )

    def _check_means(self) -> None:
        """There is a finite row for every expert that is replaced."""
        if self.means_DH is None:
            return
        shape, rows = list(self.means_DH.shape), len(self.dropped)
        if self.router != REPLACE or len(shape) != 2 or shape[0] != rows or not np.isfinite(self.means_DH).all():
            raise UserError(
                f"layer {self.name} has mean outputs {shape} for the router {self.router!r}, "
                f"expected [{rows}, H] finite numbers for {REPLACE!r}",
                hint=REMAKE,
            )

    def mean_outputs(self, hidden: int) -> Means:
        """(D, H) float32, what takes the place of each of ``dropped``, in a model of width ``hidden``.

        Raises:
            UserError: they were not read along, or are of another width.
        """
        if self.means_DH is None:
            raise UserError(
                f"the plan puts mean outputs in the place of experts of layer {self.name}, which are not at hand",
                hint="give the plan.json that names them: --plan plan.json",
            )
        if self.means_DH.shape[1] != hidden:
            raise UserError(
                f"the plan has mean outputs of {self.means_DH.shape[1]} channels for layer {self.name}, whose experts "
                f"give {hidden}",
                hint="make a plan for this model with `moe-edge plan`",
            )
        return self.means_DH

    @property
    def survivor_of(self) -> tuple[int, ...]:
        """For each of the parent's experts the one that it is merged into; itself where it is not merged."""
        survivors = {expert: own for own, merge in zip(self.keep, self.merge, strict=False) for expert in merge.experts}
        return tuple(survivors.get(expert, expert) for expert in range(self.experts))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Ids of the parent's experts that go, ascending."""
        return tuple(sorted(set(range(self.experts)) - set(self.keep)))

    def to_json(self) -> Json:
        """The layer as it stands in plan.json and in manifests."""
        values = dataclasses.asdict(dataclasses.replace(self, means_DH=None))
        del values["means_DH"]
        return values | {"keep": list(self.keep), "scores": list(self.scores)}

    @classmethod
    def from_record(cls, record: Record, *, clamp_top_k: bool = False) -> "LayerPlan":
        """Read one layer; feasibility is checked again, because plans are edited by hand."""
        keep = record.items("keep", int)
        top_k = record.take("top_k", int)
        clamp_top_k = clamp_top_k and record.take("router", str, default=ROWS) not in UNTOUCHED
        return cls(
            name=record.take("name", str),
            experts=record.take("experts", int),
            top_k=min(top_k, max(1, len(keep))) if clamp_top_k else top_k,
            keep=keep,
            scores=record.items("scores", float),
            groups=Groups.from_record(record.record("groups")),
            router=record.take("router", str, default=ROWS),
            merge=tuple(
                Merge(merge.items("experts", int), merge.items("weights", float)) for merge in record.records("merge")
            ),
            align=record.take("align", bool, default=False),
        )
