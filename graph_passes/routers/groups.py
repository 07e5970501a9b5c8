"""Read group-limited routing: only experts of the best groups stay in the ranking.

::

    ranked = Where(experts of TopK(score of each group), choice, -inf)
    score of a group = ReduceSum(TopK(choice of the group, 2))      DeepSeek-V3, https://arxiv.org/abs/2412.19437
                     = ReduceMax(choice of the group)               DeepSeek-V2, https://arxiv.org/abs/2405.04434

Our own writer has a table of the experts of each group, which may be of different sizes. DeepSeek-V2 excludes with 0,
which is below every softmax or sigmoid score but not below a score plus a bias.
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, operand, produced_by, producer, source
from graph_passes.record.block import FormError
from graph_passes.routers.constants import constant_value, numbers
from graph_passes.routers.ranking import top_k_of
from moe_spec.feasibility import Groups

MASKING = SHAPE_ONLY | {"Not", "Expand", "Greater", "Equal"}
"""Ops between the selected groups and the mask over experts."""


@dataclasses.dataclass(frozen=True)
class Grouping:
    """What restricts a choice to the best groups.

    Attributes:
        choice: (T, E) what is ranked before experts of other groups are excluded.
        groups: None where all experts may be chosen.
        group_of: the group of each expert, where a table says so; else they are runs of one length.
        fill: what excluded experts are ranked as.
        where: what excludes them.
    """

    choice: gs.Tensor
    groups: Groups | None = None
    group_of: tuple[int, ...] = ()
    fill: float = -np.inf
    where: gs.Node | None = None


def read_groups(ranked: gs.Tensor) -> Grouping:
    """What is ranked before experts of other groups were excluded, and how.

    Raises:
        FormError: a Where stands there that does something else.
    """
    where = produced_by(source(ranked), "Where")
    if where is None:
        return Grouping(ranked)
    fills = [constant_value(tensor) for tensor in where.inputs[1:]]
    excluded = next((index for index, fill in enumerate(fills) if fill in (-np.inf, 0.0)), None)
    fill = None if excluded is None else fills[excluded]
    if excluded is None or fill is None:
        raise FormError("a Where before the TopK does not exclude experts with -inf or 0", where)
    choice = where.inputs[2 - excluded]
    found = _selected(where)
    best = None if found is None else produced_by(source(found[0]), "TopK")
    if found is None or best is None:
        raise FormError("a Where before the TopK is not fed by a TopK over groups", where)
    count, scored_by = _read_scoring(best, choice)
    return Grouping(choice, Groups(count, top_k_of(best), scored_by), found[1], fill, where)


def _selected(where: gs.Node) -> tuple[gs.Tensor, tuple[int, ...]] | None:
    """(ids of the selected groups, the group of each expert if a table says so)."""
    mask = source(where.inputs[0], MASKING)
    scatter = produced_by(mask, "ScatterElements", "ScatterND")
    if scatter is not None:
        return scatter.inputs[1], ()
    counted = produced_by(mask, "ReduceSum")
    equal = None if counted is None else produced_by(source(counted.inputs[0]), "Equal")
    return None if equal is None else (equal.inputs[0], tuple(numbers(equal.inputs[1])))


def check_fill(grouping: Grouping, bias: gs.Constant | None) -> None:
    """Refuse groups whose other experts are set to 0 where 0 is not below every score.

    Raises:
        FormError: with the reason.
    """
    if grouping.fill != -np.inf and bias is not None:
        raise FormError(
            "experts of other groups are ranked as 0, which a score plus a bias can be below", grouping.where
        )


def _read_scoring(best: gs.Node, choice: gs.Tensor) -> tuple[int, int]:
    """(the number of groups, by how many of its best experts one is scored)."""
    scoring = produced_by(source(best.inputs[0]), "ReduceSum", "ReduceMax")
    if scoring is None:
        raise FormError("groups are scored neither by a sum nor by a maximum", producer(best.inputs[0]))
    members, scored_by = scoring.inputs[0], 1
    if scoring.op == "ReduceSum":
        pair = produced_by(members, "TopK")
        if pair is None or top_k_of(pair) not in (1, 2):
            raise FormError("groups are not scored by the sum of their two best experts", scoring)
        members, scored_by = pair.inputs[0], top_k_of(pair)
    reshape = produced_by(members, "Reshape")
    if reshape is None or _ungrouped(reshape.inputs[0]) is not source(choice):
        raise FormError("groups are not runs of what is ranked", scoring)
    shape = numbers(operand(reshape, 1))
    if len(shape) < 3 or shape[-2] < 1:
        raise FormError("the number of groups is no constant", reshape)
    return shape[-2], scored_by


def _ungrouped(members: gs.Tensor) -> gs.Tensor:
    """What ``members`` was before our own writer gathered it by a table, padded by one column."""
    gather = produced_by(source(members), "Gather")
    padded = None if gather is None else produced_by(gather.inputs[0], "Concat")
    return source(members if padded is None else padded.inputs[0])
