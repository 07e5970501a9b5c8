"""Read a router from the ids and weights of its K slots a token.

Read backwards, the weights are scaled (see `scales`), renormalised (see `finish`) and dropped beyond a capacity (see
`places`) from::

    values of TopK(score(logits))               softmax or sigmoid, then top-k
    score(values of TopK(logits))               top-k, then softmax or sigmoid
    score(GatherElements(logits, ids))          where a bias on the logits decides the ids
    GatherElements(score(logits), ids)          where a selection bias or groups decide the ids
    ReduceMax(score(logits))                    top-1 by ArgMax, Switch Transformer (https://arxiv.org/abs/2101.03961)

and the ids are the indices of that TopK or ArgMax; or two or more rounds stand side by side (see `sparsemixer` and
`rounds`). Casts and reshapes are stepped over.
"""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, source
from graph_passes.record.block import SCORE_FIRST, TOPK_FIRST, FormError
from graph_passes.routers.assemble import Steps, dropped, finished
from graph_passes.routers.finish import Finish, over_later_axis, read_finish
from graph_passes.routers.groups import Grouping, check_fill, read_groups
from graph_passes.routers.places import capacity_of
from graph_passes.routers.products import factors
from graph_passes.routers.ranking import Ranking, read_ranking
from graph_passes.routers.rounds import Round, round_steps
from graph_passes.routers.scales import strip_scales
from graph_passes.routers.scores import read_scores, read_selection_bias, score_of
from graph_passes.routers.sparsemixer import is_sparsemixer, sparsemixer_steps


def slot_steps(ids: gs.Tensor, weights: gs.Tensor) -> Steps:
    """What is done with the logits behind ``ids`` (T, K) and ``weights`` (T, K).

    Raises:
        FormError: with the first thing that is no step of a known router.
    """
    weights, scales = strip_scales(ids, weights)
    steps = _unscaled_steps(ids, weights)
    return steps if scales is None else dataclasses.replace(steps, scales=scales)


def _unscaled_steps(ids: gs.Tensor, weights: gs.Tensor) -> Steps:
    base, finish = read_finish(weights)
    node = producer(base)
    if node is None:
        raise FormError("the weights are not computed from logits", base)
    product = factors(base)
    if product.limits:
        return _dropped_steps(ids, base, finish)
    joined = produced_by(source(ids), "Concat")
    if joined is not None and node.op == "Concat" and len(joined.inputs) == len(node.inputs):
        return finished(_joined_steps(joined, node), finish, node)
    return _ranked_steps(ids, base, finish)


def _dropped_steps(ids: gs.Tensor, base: gs.Tensor, finish: Finish) -> Steps:
    """Weights times a mask of those that found a place."""
    node, product = producer(base), factors(base)
    assert node is not None
    masks = (*product.ids, *(limit.ids for limit in product.limits))
    if len(product.values) != 1 or any(mask is not source(ids) for mask in masks):
        raise FormError("weights are dropped by something else than the places of their experts", node)
    steps = slot_steps(ids, product.values[0])
    return finished(dropped(steps, capacity_of(product.limits, node), node), finish, node)


def _joined_steps(ids: gs.Node, weights: gs.Node) -> Steps:
    """Rounds of one choice each, side by side."""
    if is_sparsemixer(weights):
        return sparsemixer_steps(ids, weights)
    if len(ids.inputs) != 2:
        raise FormError("more than two choices are made one by one", ids)
    pairs = zip(ids.inputs, weights.inputs, strict=True)
    return round_steps(tuple(Round(source(one), source(weight)) for one, weight in pairs))


def _ranked_steps(ids: gs.Tensor, base: gs.Tensor, finish: Finish) -> Steps:
    ranking, node = read_ranking(ids), producer(base)
    assert node is not None
    scored = score_of(base)
    if scored is not None and scored[1] is ranking.values:
        grouping = read_groups(ranking.ranked)
        steps = _steps(ranking.ranked, grouping, ranking.top_k, finish, scored[0], source(grouping.choice))
        return dataclasses.replace(steps, order=TOPK_FIRST)
    gathered = None if scored is None else produced_by(scored[1], "GatherElements")
    if scored is not None and gathered is not None and source(gathered.inputs[1]) is ranking.ids:
        return _biased_steps(ranking, source(gathered.inputs[0]), scored[0], finish)
    return restricted_steps(ranking.ranked, _scores_behind(node, ranking), ranking.top_k, finish)


def _biased_steps(ranking: Ranking, logits: gs.Tensor, score: str, finish: Finish) -> Steps:
    """The best logits plus a bias, scored without it (Kolibri)."""
    grouping = read_groups(ranking.ranked)
    bias = read_selection_bias(grouping.choice, logits)
    check_fill(grouping, bias)
    steps = _steps(ranking.ranked, grouping, ranking.top_k, finish, score, logits)
    return dataclasses.replace(steps, order=TOPK_FIRST, selection_bias=bias)


def _scores_behind(node: gs.Node, ranking: Ranking) -> gs.Tensor:
    """All scores, of which ``node`` hands over those of the chosen experts."""
    if node is ranking.node and node.op == "TopK":
        return read_groups(ranking.ranked).choice
    if node.op == "GatherElements" and source(node.inputs[1]) is ranking.ids:
        return source(node.inputs[0])
    if node.op == "ReduceMax" and ranking.node.op == "ArgMax" and over_later_axis(node):
        return source(node.inputs[0])
    if node.op == "ReduceSum" and ranking.top_k == 1:
        product = factors(node.outputs[0])
        if len(product.values) == 1 and len(product.ids) == 1 and product.ids[0] is ranking.ids:
            return product.values[0]
    raise FormError("the weights are neither values of the TopK nor scores gathered by its ids", node)


def restricted_steps(ranked: gs.Tensor, scores: gs.Tensor, top_k: int, finish: Finish) -> Steps:
    """What is done with the logits behind ``scores`` (T, E), of which those of the best ``ranked`` are the weights.

    Raises:
        FormError: what is ranked is not made of the scores.
    """
    score, logits = read_scores(scores)
    grouping = read_groups(ranked)
    ranks_logits = source(grouping.choice) is logits  # the best logits score best
    bias = None if ranks_logits else read_selection_bias(grouping.choice, scores)
    check_fill(grouping, bias)
    return dataclasses.replace(_steps(ranked, grouping, top_k, finish, score, logits), selection_bias=bias)


def _steps(ranked: gs.Tensor, grouping: Grouping, top_k: int, finish: Finish, score: str, logits: gs.Tensor) -> Steps:
    return Steps(
        score=score,
        order=SCORE_FIRST,
        top_k=top_k,
        logits=logits,
        choice=grouping.choice,
        ranked=ranked,
        finish=finish,
        groups=grouping.groups,
        group_of=grouping.group_of,
    )


def is_over_experts(scores: gs.Tensor, ids: gs.Tensor) -> bool:
    """Whether ``scores`` are those of all experts, rather than of the best logits behind ``ids``."""
    found = score_of(scores)
    return found is not None and found[1] is not read_ranking(ids).values and not _is_chosen(found[1])


def _is_chosen(logits: gs.Tensor) -> bool:
    """Whether ``logits`` are taken out of all by ids."""
    return produced_by(logits, "GatherElements") is not None
