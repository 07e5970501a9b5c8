"""Read a router from the gates (T, E) that multiply the experts, 0 where one is not selected.

Read backwards, the gates are scaled and renormalised (see `finish`) from::

    ScatterElements(zeros, ids, weights)
    ReduceSum(weights (T, K, 1) where or times mask (T, K, E)) over the slots       see `hits` for the masks
    scores times or where mask (T, E)                                               Switch Transformer
    Sigmoid or Softmax of ScatterElements(-inf, ids, values of TopK(logits))        Llama 4
    Softmax or Sigmoid of logits                                                    nothing is ranked: K = E
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.block import SCORE_FIRST, TOPK_FIRST, FormError, Slots
from graph_passes.routers.assemble import Steps
from graph_passes.routers.finish import read_finish
from graph_passes.routers.groups import strip_groups
from graph_passes.routers.hits import constant_value, ids_of, scattered_ids
from graph_passes.routers.ranking import read_ranking
from graph_passes.routers.scores import SCORES, check_fill, read_scores, read_selection_bias
from graph_passes.routers.slots import slot_steps
from graph_passes.walk import produced_by, producer, source


def gate_steps(gates: gs.Tensor) -> tuple[Steps, Slots | None]:
    """What is done with the logits behind ``gates`` (T, E), and the slots where they are behind them.

    Raises:
        FormError: with the first thing that is no step of a known router.
    """
    base, finish = read_finish(gates)
    node = producer(base)
    if node is None:
        raise FormError("the gates are not computed from logits", base)
    steps, slots = _read_base(node)
    return dataclasses.replace(steps, finish=finish.after(steps.finish, node)), slots


def _read_base(node: gs.Node) -> tuple[Steps, Slots | None]:
    if node.op in SCORES:
        scattered = produced_by(source(node.inputs[0]), "ScatterElements")
        return (_plain(node), None) if scattered is None else _scored_after_scatter(node, scattered)
    if node.op == "ScatterElements":
        ids = scattered_ids(node)
        if ids is None:
            raise FormError("the gates are not scattered into zeros along the experts", node)
        return slot_steps(ids, node.inputs[2]), Slots(ids, node.inputs[2])
    masked = _masked(producer(source(node.inputs[0]))) if node.op == "ReduceSum" else _masked(node)
    if masked is None:
        raise FormError(f"{node.op} makes no gates of a known router", node)
    values, mask = masked
    ids = ids_of(mask)
    assert ids is not None
    if node.op == "ReduceSum":
        return slot_steps(ids, values), Slots(ids, values)
    return _masked_scores(values, ids)


def _plain(node: gs.Node) -> Steps:
    """Scores of all experts."""
    scores = node.outputs[0]
    score, logits = read_scores(scores)
    return Steps(score, SCORE_FIRST, None, logits, choice=scores, ranked=scores)


def _scored_after_scatter(node: gs.Node, scatter: gs.Node) -> tuple[Steps, Slots | None]:
    """The K best logits among -inf, then the score: what is not selected scores 0."""
    ids = scattered_ids(scatter, base=-np.inf)
    ranking = None if ids is None else read_ranking(ids)
    if ranking is None or source(scatter.inputs[2]) is not ranking.values:
        raise FormError("the scores are not of the best logits scattered into -inf", scatter)
    steps = Steps(SCORES[node.op], TOPK_FIRST, ranking.top_k, source(ranking.ranked), ranking.ranked, ranking.ranked)
    return steps, None


def _masked(node: gs.Node | None) -> tuple[gs.Tensor, gs.Tensor] | None:
    """(values, mask) where ``node`` is their product, or takes values where the mask is set and 0 elsewhere."""
    if node is None or node.op not in ("Mul", "Where"):
        return None
    if node.op == "Where":
        mask, values, other = node.inputs
        return (values, mask) if ids_of(mask) is not None and constant_value(other) == 0.0 else None
    for values, mask in (node.inputs, reversed(node.inputs)):
        if ids_of(mask) is not None:
            return values, mask
    return None


def _masked_scores(scores: gs.Tensor, ids: gs.Tensor) -> tuple[Steps, Slots | None]:
    """``scores`` (T, E) at the chosen ids; or one weight a token (T, 1), spread by a one-hot mask."""
    ranking = read_ranking(ids)
    base, finish = read_finish(scores)
    function = producer(base)
    if function is None or function.op not in SCORES:
        return slot_steps(ids, scores), Slots(ids, scores)
    score, logits = read_scores(base)
    choice, groups, fill = strip_groups(ranking.ranked)
    bias = None if source(choice) is logits else read_selection_bias(choice, base)
    check_fill(fill, bias, ranking.node)
    steps = Steps(
        score=score,
        order=SCORE_FIRST,
        top_k=ranking.top_k,
        logits=logits,
        choice=choice,
        ranked=ranking.ranked,
        finish=finish,
        selection_bias=bias,
        groups=groups,
    )
    return steps, None
