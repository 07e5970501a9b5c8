"""Read what a router ranks: the TopK or ArgMax behind its ids."""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand, producer, source
from graph_passes.record.block import FormError
from graph_passes.routers.constants import whole_number


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The K best of what is ranked.

    Attributes:
        node: the TopK or ArgMax.
        ids: (T, K) their ids.
        values: (T, K) what they were ranked by; None of an ArgMax, which keeps it to itself.
        ranked: (T, E).
        top_k: K.
    """

    node: gs.Node
    ids: gs.Tensor
    values: gs.Tensor | None
    ranked: gs.Tensor
    top_k: int


def read_ranking(ids: gs.Tensor) -> Ranking:
    """The ranking behind ``ids`` (T, K).

    Raises:
        FormError: they are no ids of a TopK or ArgMax over the last axis.
    """
    ids = source(ids)
    node = producer(ids)
    if node is not None and node.op == "ArgMax" and last_axis(node, default=0):
        return Ranking(node, ids, None, node.inputs[0], 1)
    if node is None or node.op != "TopK" or node.outputs[1] is not ids:
        raise FormError("the expert ids are not the indices of a TopK", node)
    if not last_axis(node, default=-1) or not node.attrs.get("largest", 1):
        raise FormError("the TopK does not take the largest of the last axis", node)
    return Ranking(node, ids, node.outputs[0], node.inputs[0], top_k_of(node))


def top_k_of(topk: gs.Node) -> int:
    """K.

    Raises:
        FormError: it is computed.
    """
    k = whole_number(operand(topk, 1))
    if k is None:
        raise FormError("K is no constant", topk)
    return k


def last_axis(node: gs.Node, default: int) -> bool:
    """Whether ``node`` works on another axis than the first; routers have two, or three with a batch axis."""
    return bool(node.attrs.get("axis", default) != 0)
