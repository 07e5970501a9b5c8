"""Plan a merge: a layer that was to drop experts merges them instead, into as many."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError, did_you_mean
from moe_spec.feasibility import Groups
from moe_spec.layer_plan import ALIAS, MERGE_ROUTERS, LayerPlan, Merge
from moe_spec.statistics import KEYS, LayerStatistics
from pruning.criteria.scores import Scores, finite
from pruning.merging.mergers import Merger


def check_merging(criterion: str, router: str, *, protect: bool) -> None:
    """Refuse what cannot be asked of a plan that merges.

    Raises:
        UserError: a router that is none of ``MERGE_ROUTERS``, or experts that shall stay as they are.
    """
    if protect:
        raise UserError(
            f"--protect keeps super experts as they are, but criterion {criterion!r} merges experts",
            hint="leave out --protect",
        )
    if router not in MERGE_ROUTERS:
        raise UserError(
            f"{router!r} is no router of a plan that merges experts", hint=did_you_mean(router, MERGE_ROUTERS)
        )


def parts_of(layer: str, groups: Groups | None, count: int, router: str) -> int:
    """How many parts of a layer are merged by themselves, into ``count`` experts between them.

    Those are its routing groups, for a router finds an expert by its group; not where its rows share experts.

    Raises:
        UserError: groups would have different numbers of them.
    """
    if groups is None or router == ALIAS:
        return 1
    if count % groups.count:
        raise UserError(
            f"layer {layer} merges its experts into {count}, but has {groups.count} routing groups: experts of "
            "different groups cannot become one",
            hint=f"keep a multiple of {groups.count}, the number of groups: --keep {groups.count}",
        )
    return groups.count


def check_capacity(layer: str, experts: int, count: int, merger: Merger, router: str) -> None:
    """Refuse groups that cannot hold all experts of a layer where the rows of all lead to one.

    Raises:
        UserError: there are too few.
    """
    fewest = 1 if merger.capacity is None else -(-experts // merger.capacity)
    if router == ALIAS and count < fewest:
        raise UserError(
            f"layer {layer} merges its {experts} experts into {count} groups of at most {merger.capacity}, but with "
            f"--router {ALIAS} each has to be in one",
            hint=f"keep at least {fewest}: --keep {fewest}; or drop the others: --router rows",
        )


def merge_instead(plan: LayerPlan, layer: LayerStatistics, merger: Merger, router: str) -> LayerPlan:
    """``plan`` with as many survivors and the same K, but merged by ``merger``.

    1. Routing groups are merged one by one, into the same number each, for a router finds an expert by its group; not
       where the router stays as it is, and its rows share experts.
    2. Weights of a mean are the merger's scores; where all of a group are 0 they are equal.

    Args:
        plan: what a budget leaves of the layer.
        layer: its statistics.
        merger: a row of ``MERGERS``.
        router: one of ``MERGE_ROUTERS``.

    Raises:
        UserError: statistics that the merger needs and the layer lacks, or that are not finite; or survivors that
            routing groups cannot have the same number of, or whose groups do not hold all that they have to.
    """
    for values in layer.sums.values():
        finite(layer.name, values)
    check_capacity(layer.name, layer.experts, len(plan.keep), merger, router)
    parts = parts_of(layer.name, layer.groups, len(plan.keep), router)
    count = len(plan.keep) // parts
    scores_E = merger.scores(layer)
    groups = [
        ids[members]
        for ids in np.split(np.arange(layer.experts), parts)
        for members in merger.group(_part(layer, ids), scores_E[ids], count)
    ]
    merges = sorted(_merge(group.tolist(), scores_E) for group in groups)
    return dataclasses.replace(
        plan,
        keep=tuple(survivor for survivor, _, _ in merges),
        scores=tuple(scores_E.tolist()),
        router=router,
        merge=tuple(Merge(experts, weights) for _, experts, weights in merges),
        align=merger.align,
    )


def _merge(group: Sequence[int], scores_E: Scores) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
    """The survivor of one group, all of it, and their weights."""
    experts = tuple(sorted(group))
    weights = [float(scores_E[expert]) for expert in experts]
    survivor = experts[int(np.argmax(weights))]  # of equals the first
    return survivor, experts, tuple(weights) if any(weights) else (1.0,) * len(experts)


def _part(layer: LayerStatistics, ids: npt.NDArray[np.integer]) -> LayerStatistics:
    """The statistics of some experts of a layer, as if it had no others."""

    def some(values: npt.NDArray[np.float64], axes: str) -> npt.NDArray[np.float64]:
        for axis, letter in enumerate(axes):
            values = values.take(ids, axis) if letter == "E" else values
        return values

    sums = {key: some(values, KEYS[key].axes) for key, values in layer.sums.items()}
    return dataclasses.replace(layer, experts=len(ids), sums=sums, groups=None)
