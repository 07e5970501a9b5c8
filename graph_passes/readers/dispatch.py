"""Reader for experts that have places for so many tokens: tokens are dispatched into them, and combined again.

::

    inside  (E, C, H) or (E, G, C, H) = Einsum(dispatch, tokens)        dispatch (T, E, C) or (G, S, E, C): 0 or 1
    outputs = each expert's FFN of its own places                       stacked weights, or a branch an expert
    out     = Einsum(combine, outputs)                                  combine: dispatch times the weights

Switch Transformer (https://arxiv.org/abs/2101.03961), GShard (https://arxiv.org/abs/2006.16668), V-MoE
(https://arxiv.org/abs/2106.05974). The combine weights summed over the places are gates, read as such.
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, source
from graph_passes.readers.axes.axis_reader import AxisReader
from graph_passes.readers.axes.names import EXPERTS, HIDDEN, PARTS, TOKENS, WIDTH
from graph_passes.readers.axes.operands import subscripts
from graph_passes.readers.parts.batched_ffn import DOWN, Projection, experts_of, read_ffn
from graph_passes.readers.parts.single_expert import read_ffn as read_single
from graph_passes.readers.parts.single_expert import stack_experts
from graph_passes.readers.parts.weighing import MOVES
from graph_passes.readers.stacked import LAYOUT
from graph_passes.readers.trial.interpreter import Interpreter
from graph_passes.record.block import Experts, FormError, MoEBlock, Router
from graph_passes.routers import Weights, read_gates
from graph_passes.routers.places import capacity_of
from graph_passes.routers.products import Product, factors

FORM = "dispatch"
LOOKS_FOR = "Einsum that combines the places of the experts"

PLACES = ("C",)
"""The axis of an expert's places."""

SOME_PLACES = 7919
"""Stands for the length of that axis, which no other axis has."""


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The Einsums that combine what the experts computed in their places."""
    return [node for node in graph.nodes if node.op == "Einsum" and _combines(node)]


def read(einsum: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose output is ``einsum``'s.

    Raises:
        FormError: with the first op that stands elsewhere than in this form.
    """
    side = 0 if is_placed(einsum.inputs[0]) else 1
    combine, outputs = einsum.inputs[side], einsum.inputs[1 - side]
    router = dataclasses.replace(read_gates(combine, weights), gates=None)
    count = router.weight_EH.shape[0]
    concat = produced_by(source(outputs), "Concat")
    if concat is None:
        inside, experts = _read_stacked(source(outputs, MOVES), outputs, router, weights)
    else:
        inside, experts = _read_branches(concat, weights)
    dispatch = produced_by(inside, "Einsum")
    if dispatch is None:
        raise FormError("the experts do not read dispatched tokens", producer(inside))
    tokens = _dispatched(dispatch, combine)
    _check_letters(dispatch, einsum, tokens, side)
    return MoEBlock(
        name=router.scope or name,
        form=FORM,
        hidden=tokens,
        out=einsum.outputs[0],
        router=router,
        experts=experts,
        keep=tuple(range(count)),
        shaped_like=tokens if len(subscripts(einsum)[1]) != 2 else None,
    )


def _combines(einsum: gs.Node) -> bool:
    if len(einsum.inputs) != 2 or any(isinstance(tensor, gs.Constant) for tensor in einsum.inputs):
        return False
    try:
        terms, result = subscripts(einsum)
    except FormError:
        return False
    summed = (set(terms[0]) & set(terms[1])) - set(result)
    try:
        return len(summed) == 2 and any(is_placed(tensor) for tensor in einsum.inputs)
    except FormError:  # places, but none that this file knows: the reader says why
        return True


def is_placed(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is a product, or a sum of products, that has a one-hot mask of places in it."""
    node = produced_by(source(tensor), "Add")
    terms = [tensor] if node is None else list(node.inputs)
    return all(factors(term).limits for term in terms)


def _read_stacked(result: gs.Tensor, outputs: gs.Tensor, router: Router, weights: Weights) -> tuple[gs.Tensor, Experts]:
    """(what the experts read, the experts), computed side by side."""
    node, bias = producer(result), None
    if node is not None and node.op == "Add":
        for this, other in (node.inputs, reversed(node.inputs)):
            bias = LAYOUT.bias(other, HIDDEN, None)
            if bias is not None:
                node = producer(source(this, MOVES))
                break
    product = None if node is None else LAYOUT.product(node, DOWN)
    if product is None:
        raise FormError("what is combined is no product with stacked expert weights", node or result)
    ffn = read_ffn(LAYOUT, product.x, Projection(product, bias))
    experts = experts_of(ffn, router.weight_EH.shape[0], weights)
    inside = source(ffn.up.product.x, MOVES)
    dispatch = produced_by(inside, "Einsum")
    axes = AxisReader(EXPERTS)
    axes.size(EXPERTS, router.weight_EH.shape[0])
    axes.size(HIDDEN, router.weight_EH.shape[1])
    axes.size(WIDTH, experts.up_EHF.shape[2])
    axes.size(PLACES, SOME_PLACES if router.capacity is None else _places(router))
    rank = 0 if dispatch is None else len(subscripts(dispatch)[1])
    placed = (EXPERTS, PLACES, HIDDEN) if rank == 3 else (EXPERTS, TOKENS, PLACES, HIDDEN)
    axes.know(inside, *placed)
    for held in ffn.held():
        axes.know(held.tensor, *held.axes)
    axes.expect(outputs, *placed)
    return inside, experts


def _places(router: Router) -> int:
    limit = None if router.capacity is None else router.capacity.limit
    return int(limit.values.reshape(-1)[0]) if isinstance(limit, gs.Constant) else SOME_PLACES


def _read_branches(concat: gs.Node, weights: Weights) -> tuple[gs.Tensor, Experts]:
    """(what the experts read, the experts), one a branch, each on its own part of the first axis."""
    ffns = [read_single(output, weights) for output in concat.inputs]
    inside = _whole(ffns[0][0])
    run = Interpreter(weights, 1)
    run.give(inside, np.arange(len(ffns))[:, None, None].astype(float))
    parts = [run.of(x).reshape(-1).tolist() for x, _ in ffns]
    if parts != [[expert] for expert in range(len(ffns))] or concat.attrs["axis"] != 0:
        raise FormError("the experts do not read one part each of the dispatched tokens", concat)
    return inside, stack_experts([parts for _, parts in ffns])


def _whole(part: gs.Tensor) -> gs.Tensor:
    """What ``part`` was taken from."""
    return source(part, MOVES | PARTS | {"Gather"})


def _dispatched(dispatch: gs.Node, combine: gs.Tensor) -> gs.Tensor:
    """The tokens that ``dispatch`` puts into places, which have to be those of ``combine``.

    Raises:
        FormError: it puts them elsewhere.
    """
    for mask, tokens in (dispatch.inputs, reversed(dispatch.inputs)):
        if source(mask) is source(combine):  # cast to bool and back
            return tokens
        places, wanted = factors(mask), factors(combine)
        if places.is_mask and wanted.limits and _same_places(places, wanted, dispatch):
            return tokens
    raise FormError("tokens are dispatched into other places than they are combined from", dispatch)


def _same_places(places: Product, wanted: Product, node: gs.Node) -> bool:
    known = {id(one) for one in wanted.ids}
    return {id(one) for one in places.ids} == known and capacity_of((*places.limits, *wanted.limits), node) is not None


def _check_letters(dispatch: gs.Node, einsum: gs.Node, tokens: gs.Tensor, side: int) -> None:
    """Tokens go to the experts' axis in front, and come back from there."""
    (first, second), inside = subscripts(dispatch)
    mask, read = (second, first) if tokens is dispatch.inputs[0] else (first, second)
    terms, result = subscripts(einsum)
    combine, outputs = terms[side], terms[1 - side]
    lead, places = combine[:-2], combine[-2:]
    fits = (
        outputs == places[0] + lead[:-1] + places[1] + result[-1]
        and result[:-1] == lead
        and inside == mask[-2] + mask[:-3] + mask[-1] + read[-1]
        and read[:-1] == mask[:-2]
        and len(mask) == len(combine)
    )
    if not fits:
        raise FormError("tokens and places do not stand where a dispatch has them", einsum)
