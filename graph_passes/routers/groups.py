"""Read group-limited routing: only experts of the best groups stay in the ranking.

::

    ranked = Where(experts of TopK(score of each group), choice, -inf)
    score of a group = ReduceSum(TopK(choice of the group, 2))      DeepSeek-V3, https://arxiv.org/abs/2412.19437
                     = ReduceMax(choice of the group)               DeepSeek-V2, https://arxiv.org/abs/2405.04434

DeepSeek-V2 excludes with 0, which is below every softmax or sigmoid score but not below a score plus a bias.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.block import FormError
from graph_passes.routers.ranking import top_k_of
from graph_passes.walk import SHAPE_ONLY, operand, produced_by, producer, scalar, source
from moe_spec.feasibility import Groups

MASKING = SHAPE_ONLY | {"Not", "Expand", "Greater", "Equal"}
"""Ops between the selected groups and the mask over experts."""


def strip_groups(ranked: gs.Tensor) -> tuple[gs.Tensor, Groups | None, float]:
    """What is ranked before experts of other groups were excluded; the groups; what excluded experts were set to.

    Raises:
        FormError: a Where stands there that does something else.
    """
    where = produced_by(source(ranked), "Where")
    if where is None:
        return ranked, None, -np.inf
    fills = [scalar(source(tensor, {"Cast", "CastLike"})) for tensor in where.inputs[1:]]
    excluded = next((index for index, fill in enumerate(fills) if fill in (-np.inf, 0.0)), None)
    if excluded is None:
        raise FormError("a Where before the TopK does not exclude experts with -inf or 0", where)
    choice = where.inputs[2 - excluded]
    scatter = produced_by(source(where.inputs[0], MASKING), "ScatterElements", "ScatterND")
    best = None if scatter is None else produced_by(source(scatter.inputs[1]), "TopK")
    if best is None:
        raise FormError("a Where before the TopK is not fed by a TopK over groups", where)
    count, scored_by = _read_scoring(best, choice)
    fill = fills[excluded]
    assert fill is not None
    return choice, Groups(count, top_k_of(best), scored_by), fill


def _read_scoring(best: gs.Node, choice: gs.Tensor) -> tuple[int, int]:
    """(the number of groups, by how many of its best experts one is scored)."""
    scoring = produced_by(source(best.inputs[0]), "ReduceSum", "ReduceMax")
    if scoring is None:
        raise FormError("groups are scored neither by a sum nor by a maximum", producer(best.inputs[0]))
    members, scored_by = scoring.inputs[0], 1
    if scoring.op == "ReduceSum":
        pair = produced_by(members, "TopK")
        if pair is None or top_k_of(pair) != 2:
            raise FormError("groups are not scored by the sum of their two best experts", scoring)
        members, scored_by = pair.inputs[0], 2
    reshape = produced_by(members, "Reshape")
    if reshape is None or source(reshape.inputs[0]) is not source(choice):
        raise FormError("groups are not runs of what is ranked", scoring)
    shape = operand(reshape, 1)
    if not isinstance(shape, gs.Constant) or len(shape.values) < 3:
        raise FormError("the number of groups is no constant", reshape)
    return int(shape.values[-2]), scored_by
