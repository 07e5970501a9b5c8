"""Read a choice by two ArgMax, the second without the first: GShard (https://arxiv.org/abs/2006.16668) and NLLB-MoE.

::

    id 1 = ArgMax(scores or logits)     id 2 = ArgMax(Where(one-hot of id 1, -inf, scores or logits))
    weight k = ReduceSum(scores * mask k) [/ (weight 1 + weight 2), perhaps plus eps or clipped]

The mask of a round drops what finds no place, where there is a capacity. The two best by two ArgMax are the TopK.
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, source
from graph_passes.record.block import SCORE_FIRST, FormError
from graph_passes.routers.assemble import Steps
from graph_passes.routers.constants import constant_value
from graph_passes.routers.finish import AS_IT_STANDS, Finish, strip_eps
from graph_passes.routers.hits import ids_of
from graph_passes.routers.places import Limit, capacity_of
from graph_passes.routers.products import factors
from graph_passes.routers.ranking import Ranking, read_ranking
from graph_passes.routers.scores import read_scores


@dataclasses.dataclass(frozen=True)
class Round:
    """One choice a token: its id (T,), its weight (T,), and what it drops."""

    ids: gs.Tensor
    weight: gs.Tensor
    limits: tuple[Limit, ...] = ()


def round_steps(rounds: tuple[Round, ...]) -> Steps:
    """What is done with the logits behind two ``rounds``.

    Raises:
        FormError: the rounds do not fit together.
    """
    first, second = (read_ranking(each.ids) for each in rounds)
    _check_second(first, second)
    raw, finish = _strip_total(rounds)
    score, logits, limits = _read_raw(raw, first, second)
    outer = tuple(limit for each in rounds for limit in each.limits)
    capacity = capacity_of((*limits, *outer), second.node)
    if capacity is not None and finish.renormalize:
        capacity = dataclasses.replace(capacity, before_renormalisation=bool(limits))
    return Steps(
        score=score,
        order=SCORE_FIRST,
        top_k=2,
        logits=logits,
        choice=first.ranked,
        ranked=first.ranked,
        finish=finish,
        capacity=capacity,
    )


def _check_second(first: Ranking, second: Ranking) -> None:
    where = produced_by(source(second.ranked), "Where")
    excluded = None if where is None else ids_of(where.inputs[0])
    if where is None or excluded is not first.ids or constant_value(where.inputs[1]) != -np.inf:
        raise FormError("the second choice is not made without the first", second.node)


def _strip_total(rounds: tuple[Round, ...]) -> tuple[list[gs.Tensor], Finish]:
    """The weights before they were divided by their sum."""
    divisions = [produced_by(source(each.weight), "Div") for each in rounds]
    found = [node for node in divisions if node is not None]
    if not found:
        return [source(each.weight) for each in rounds], AS_IT_STANDS
    if len(found) == 1:
        raise FormError("one of two weights is divided", found[0])
    raw = [source(node.inputs[0]) for node in found]
    for node in found:
        total, eps, clips = strip_eps(node.inputs[1])
        added = produced_by(total, "Add")
        terms = [] if added is None else [source(term) for term in added.inputs]
        if not (len(terms) == 2 and all(any(term is one for one in raw) for term in terms)):
            raise FormError("the weights are divided by something else than their sum", node)
    return raw, Finish(renormalize=True, eps=eps, eps_clips=clips)


def _read_raw(raw: list[gs.Tensor], first: Ranking, second: Ranking) -> tuple[str, gs.Tensor, tuple[Limit, ...]]:
    """(score, logits, limits) of weights that are scores at the ids, 0 where dropped."""
    products = [factors(weight) for weight in raw]
    found = [product.values[0] if len(product.values) == 1 else None for product in products]
    rankings = zip(products, (first, second), strict=True)
    chosen = all(len(product.ids) == 1 and product.ids[0] is ranking.ids for product, ranking in rankings)
    if not chosen or found[0] is None or found[1] is None or source(found[0]) is not source(found[1]):
        raise FormError("the weights of two choices are no scores at their ids", producer(raw[0]))
    score, logits = read_scores(found[0])
    known = (id(logits), id(source(found[0])))
    if any(id(source(value)) not in known for value in (first.ranked, _filled(second))):
        raise FormError("what is ranked are neither the scores nor the logits", first.node)
    return score, logits, tuple(limit for product in products for limit in product.limits)


def _filled(second: Ranking) -> gs.Tensor:
    """What the second choice is made of, before the first was taken out."""
    tensor: gs.Tensor = source(second.ranked).inputs[0].inputs[2]
    return tensor
