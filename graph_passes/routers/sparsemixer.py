"""Read the sparsemixer of Phi-3.5-MoE (https://arxiv.org/abs/2409.12136): K rounds of ArgMax, without a TopK.

Each round takes the best of the logits that are left, and weighs it by a softmax over its rivals::

    best, id = ReduceMax(left), ArgMax(left)
    rivals   = Where((best - logits) / Max(Abs(logits), best) > 2 jitter_eps, -inf, left)
    weight   = GatherElements(Softmax(rivals), id)
    left     = ScatterElements(left, id, -inf)              for the next round

Ids and weights of the rounds are put side by side by Concat.
"""

import dataclasses
import itertools

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, produced_by, producer, source
from graph_passes.record.block import SCORE_FIRST, FormError
from graph_passes.routers.assemble import Steps
from graph_passes.routers.constants import constant_value, split_number
from graph_passes.routers.ranking import read_ranking

NAME = "sparsemixer"
TYPED = SHAPE_ONLY | {"CastLike"}


@dataclasses.dataclass(frozen=True)
class _Round:
    """One round: what was left before it, all logits, the threshold of rivals, and the choice."""

    left: gs.Tensor
    logits: gs.Tensor
    threshold: float
    ids: gs.Tensor


def is_sparsemixer(weights: gs.Node) -> bool:
    """Whether the ``weights`` that a Concat puts side by side are softmaxes over rivals."""
    gather = produced_by(source(weights.inputs[0]), "GatherElements")
    return gather is not None and produced_by(source(gather.inputs[0]), "Softmax") is not None


def sparsemixer_steps(ids: gs.Node, weights: gs.Node) -> Steps:
    """What is done with the logits behind the rounds whose ids and weights two Concat put side by side.

    Raises:
        FormError: the rounds do not fit together.
    """
    rounds = [_read_round(*pair) for pair in zip(ids.inputs, weights.inputs, strict=True)]
    first = rounds[0]
    for before, after in itertools.pairwise(rounds):
        _check_follows(before, after)
    return Steps(
        score=NAME,
        order=SCORE_FIRST,
        top_k=len(rounds),
        logits=first.logits,
        choice=first.left,
        ranked=first.left,
        jitter_eps=first.threshold / 2,
    )


def _read_round(ids: gs.Tensor, weight: gs.Tensor) -> _Round:
    ranking = read_ranking(ids)
    left = source(ranking.ranked)
    gather = produced_by(source(weight), "GatherElements")
    softmax = None if gather is None else produced_by(source(gather.inputs[0]), "Softmax")
    if gather is None or softmax is None or source(gather.inputs[1]) is not ranking.ids:
        raise FormError("the weight of a round is no softmax at its id", producer(source(weight)))
    where = produced_by(source(softmax.inputs[0]), "Where")
    if where is None or constant_value(where.inputs[1]) != -np.inf or source(where.inputs[2]) is not left:
        raise FormError("a softmax is not over the rivals of the best", softmax)
    logits, threshold = _read_rivals(source(where.inputs[0]), left)
    return _Round(left, logits, threshold, ranking.ids)


def _read_rivals(far: gs.Tensor, left: gs.Tensor) -> tuple[gs.Tensor, float]:
    """(logits, threshold) of ``(best - logits) / Max(Abs(logits), best) > threshold``."""
    greater = produced_by(far, "Greater")
    parts = None if greater is None else split_number(greater)
    ratio = None if parts is None else produced_by(source(parts[0]), "Div")
    if parts is None or ratio is None:
        raise FormError("rivals are not told by a threshold", producer(far))
    difference, factor = (produced_by(source(tensor), "Sub", "Max") for tensor in ratio.inputs)
    if difference is None or factor is None or (difference.op, factor.op) != ("Sub", "Max"):
        raise FormError("rivals are not told by their relative distance to the best", ratio)
    logits = source(difference.inputs[1])
    maxima = [produced_by(source(tensor, TYPED), "ReduceMax") for tensor in (difference.inputs[0], *factor.inputs)]
    best = [node for node in maxima if node is not None and source(node.inputs[0]) is left]
    magnitudes = [produced_by(source(tensor, TYPED), "Abs") for tensor in factor.inputs]
    if len(best) != 2 or not any(node is not None and source(node.inputs[0]) is logits for node in magnitudes):
        raise FormError("rivals are not told by their relative distance to the best", ratio)
    return logits, parts[1]


def _check_follows(before: _Round, after: _Round) -> None:
    """What is left in a round is what was left before without what was taken."""
    scatter = produced_by(after.left, "ScatterElements")
    taken = (
        scatter is not None
        and source(scatter.inputs[0]) is before.left
        and source(scatter.inputs[1]) is before.ids
        and constant_value(scatter.inputs[2]) == -np.inf
    )
    if not taken or after.logits is not before.logits or after.threshold != before.threshold:
        raise FormError("a round does not go on where the one before ended", producer(after.left))
