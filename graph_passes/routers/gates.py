"""Read a router from the gates (T, E) that multiply the experts, 0 where one is not selected.

Read backwards, the gates are scaled and renormalised (see `finish`) from::

    ScatterElements(zeros, ids, weights)
    ReduceSum(weights (T, K, 1) times mask (T, K, E)) over the slots                see `hits` for the masks,
    scores (T, E) or weight (T, 1) times mask (T, E)                                `products` for how they multiply
    weight 1 times mask 1 plus weight 2 times mask 2                                see `rounds`
    Sigmoid or Softmax of ScatterElements(-inf, ids, values of TopK(logits))        Llama 4
    Softmax or Sigmoid of logits                                                    nothing is ranked: K = E
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, source
from graph_passes.record.block import SCORE_FIRST, TOPK_FIRST, FormError, Slots
from graph_passes.routers.assemble import Steps, dropped, finished
from graph_passes.routers.finish import read_finish
from graph_passes.routers.hits import scattered_ids
from graph_passes.routers.places import capacity_of
from graph_passes.routers.products import Product, factors
from graph_passes.routers.ranking import read_ranking
from graph_passes.routers.rounds import Round, round_steps
from graph_passes.routers.scales import strip_row
from graph_passes.routers.scores import read_scores, score_of
from graph_passes.routers.slots import is_over_experts, restricted_steps, slot_steps


def gate_steps(gates: gs.Tensor) -> tuple[Steps, Slots | None]:
    """What is done with the logits behind ``gates`` (T, E), and the slots where they are behind them.

    Raises:
        FormError: with the first thing that is no step of a known router.
    """
    gates, scales = strip_row(gates)
    base, finish = read_finish(gates)
    node = producer(base)
    if node is None:
        raise FormError("the gates are not computed from logits", base)
    steps, slots = _read_base(node)
    steps = finished(steps, finish, node)
    return steps if scales is None else dataclasses.replace(steps, scales=scales), slots


def _read_base(node: gs.Node) -> tuple[Steps, Slots | None]:
    scored = score_of(node.outputs[0])
    if scored is not None:
        scattered = produced_by(scored[1], "ScatterElements")
        return (_plain(node), None) if scattered is None else _scored_after_scatter(scored[0], scattered)
    if node.op == "ScatterElements":
        ids = scattered_ids(node)
        if ids is None:
            raise FormError("the gates are not scattered into zeros along the experts", node)
        return slot_steps(ids, node.inputs[2]), Slots(ids, node.inputs[2])
    if node.op == "Add":
        return round_steps(tuple(_round(tensor) for tensor in node.inputs)), None
    return product_steps(factors(node.outputs[0]), node)


def product_steps(product: Product, node: gs.Node) -> tuple[Steps, Slots | None]:
    """What is done with the logits behind the factors of gates, and the slots where they are behind them.

    Raises:
        FormError: with the first thing that is no step of a known router.
    """
    if len(product.values) != 1 or len(product.ids) != 1:
        raise FormError(f"{node.op} makes no gates of a known router", node)
    (values,), (ids,) = product.values, product.ids
    base, finish = read_finish(values)
    if is_over_experts(base, ids):
        ranking = read_ranking(ids)
        steps, slots = restricted_steps(ranking.ranked, base, ranking.top_k, finish), None
    else:
        steps, slots = slot_steps(ids, values), Slots(ids, values)
    return dropped(steps, capacity_of(product.limits, node), node), slots


def _round(tensor: gs.Tensor) -> Round:
    product = factors(tensor)
    if len(product.values) != 1 or len(product.ids) != 1:
        raise FormError("a term of the gates is no weight times a one-hot mask", producer(source(tensor)))
    return Round(product.ids[0], product.values[0], product.limits)


def _plain(node: gs.Node) -> Steps:
    """Scores of all experts."""
    scores = node.outputs[0]
    score, logits = read_scores(scores)
    return Steps(score, SCORE_FIRST, None, logits, choice=scores, ranked=scores)


def _scored_after_scatter(score: str, scatter: gs.Node) -> tuple[Steps, Slots | None]:
    """The K best logits among -inf, then the score: what is not selected scores 0."""
    ids = scattered_ids(scatter, base=-np.inf)
    ranking = None if ids is None else read_ranking(ids)
    if ranking is None or source(scatter.inputs[2]) is not ranking.values:
        raise FormError("the scores are not of the best logits scattered into -inf", scatter)
    logits = source(ranking.ranked)
    return Steps(score, TOPK_FIRST, ranking.top_k, logits, ranking.ranked, ranking.ranked), None
