"""Read a router from the ids and weights of its K slots a token.

Read backwards, the weights are scaled and renormalised (see `finish`) from::

    values of TopK(score(logits))               softmax or sigmoid, then top-k
    score(values of TopK(logits))               top-k, then softmax or sigmoid
    GatherElements(score(logits), ids)          where a selection bias or groups decide the ids
    ReduceMax(score(logits))                    top-1 by ArgMax, Switch Transformer (https://arxiv.org/abs/2101.03961)

and the ids are the indices of that TopK or ArgMax. Casts and reshapes are stepped over.
"""

import onnx_graphsurgeon as gs

from graph_passes.block import SCORE_FIRST, TOPK_FIRST, FormError
from graph_passes.routers.assemble import Steps
from graph_passes.routers.finish import over_last_axis, read_finish
from graph_passes.routers.groups import strip_groups
from graph_passes.routers.ranking import Ranking, read_ranking
from graph_passes.routers.scores import SCORES, check_fill, read_scores, read_selection_bias
from graph_passes.walk import producer, source


def slot_steps(ids: gs.Tensor, weights: gs.Tensor) -> Steps:
    """What is done with the logits behind ``ids`` (T, K) and ``weights`` (T, K).

    Raises:
        FormError: with the first thing that is no step of a known router.
    """
    base, finish = read_finish(weights)
    ranking = read_ranking(ids)
    choice, groups, fill = strip_groups(ranking.ranked)
    score, order, logits, bias = _read_base(base, ranking, choice)
    check_fill(fill, bias, ranking.node)
    return Steps(
        score=score,
        order=order,
        top_k=ranking.top_k,
        logits=logits,
        choice=choice,
        ranked=ranking.ranked,
        finish=finish,
        selection_bias=bias,
        groups=groups,
    )


def _read_base(base: gs.Tensor, ranking: Ranking, choice: gs.Tensor) -> tuple[str, str, gs.Tensor, gs.Constant | None]:
    """(score, order, logits, selection bias) of weights that are ``base`` before renormalisation."""
    node = producer(base)
    if node is None:
        raise FormError("the weights are not computed from logits", base)
    if node.op in SCORES and ranking.values is not None and source(node.inputs[0]) is ranking.values:
        return SCORES[node.op], TOPK_FIRST, source(choice), None
    scores = _scores_behind(node, ranking, choice)
    score, logits = read_scores(scores)
    if ranking.values is None and source(choice) is logits:  # ArgMax of logits is ArgMax of scores
        return score, SCORE_FIRST, logits, None
    return score, SCORE_FIRST, logits, read_selection_bias(choice, scores)


def _scores_behind(node: gs.Node, ranking: Ranking, choice: gs.Tensor) -> gs.Tensor:
    """All scores, of which ``node`` hands over those of the chosen experts."""
    if node is ranking.node and node.op == "TopK":
        return choice
    if node.op == "GatherElements" and source(node.inputs[1]) is ranking.ids:
        return source(node.inputs[0])
    if node.op == "ReduceMax" and ranking.node.op == "ArgMax" and over_last_axis(node):
        return source(node.inputs[0])
    raise FormError("the weights are neither values of the TopK nor scores gathered by its ids", node)
