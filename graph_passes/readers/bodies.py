"""Experts inside the bodies of ``If``, ``Loop`` and ``Scan``: no exporter emits them, so they are refused by name.

A body holds a whole layer where it routes and multiplies by what it routed, or has an op of experts. A body that only
multiplies by weights may be anything; it holds experts where a router that no reader took stands before it.
"""

import dataclasses
from collections.abc import Mapping

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, every_node, source
from graph_passes.readers.sites import RANKING, projection_before
from graph_passes.record.block import Refusal, place_of
from moe_spec.experts_op import DOMAIN

FORM = "control flow"
PRODUCTS = ("MatMul", "Gemm", "Einsum")
EXPERTS_OPS = ("MoE", "QMoE", "TRT_MoE")
PICKED = SHAPE_ONLY | {"Gather", "Slice", "Transpose"}
"""Ops that take the weight of one expert out of a stack."""


@dataclasses.dataclass(frozen=True)
class Body:
    """A node whose bodies multiply by weights.

    Attributes:
        position: of the node in the graph.
        refusal: what is said of it where it holds experts.
        routes: whether it is certain that it does.
    """

    position: int
    refusal: Refusal
    routes: bool


def find_bodies(graph: gs.Graph, order: Mapping[int, int]) -> list[Body]:
    """The control flow of ``graph`` that may hold experts; ``order`` gives the positions of nodes."""
    found = []
    for node in graph.nodes:
        inner = [other for body in node.subgraphs() for other in every_node(body)]
        scanned = {id(tensor) for other in (node, *inner) for tensor in _scanned_weights(other)}
        routes = any(_is_experts(other) or _routes(other, scanned) for other in inner)
        if routes or any(_multiplies_weights(other, scanned) for other in inner):
            reason = f"experts inside the body of {place_of(node)} are not read; no exporter emits them"
            found.append(Body(order[id(node)], Refusal(FORM, reason, place_of(node)), routes))
    return found


def _scanned_weights(node: gs.Node) -> list[gs.Tensor]:
    """What the body of a Scan is given of stacked weights, one after the other."""
    if node.op != "Scan":
        return []
    (body,) = node.subgraphs()
    pairs = zip(node.inputs, body.inputs, strict=False)
    return [inner for outer, inner in pairs if isinstance(source(outer, PICKED), gs.Constant)]


def _is_experts(node: gs.Node) -> bool:
    return node.op in EXPERTS_OPS or node.domain == DOMAIN


def _routes(node: gs.Node, scanned: set[int]) -> bool:
    """Whether ``node`` ranks a projection, and something is multiplied by what comes of it."""
    if node.op not in RANKING:
        return False
    projection = projection_before(node.inputs[0], lambda tensor: _is_weight(tensor, scanned))
    return projection is not None and _leads_to_product(node)


def _leads_to_product(ranking: gs.Node) -> bool:
    front, seen = list(ranking.outputs), set()
    while front:
        for node in front.pop().outputs:
            if id(node) not in seen:
                seen.add(id(node))
                if node.op in PRODUCTS or (node.op == "Mul" and not _scales(node)):
                    return True
                front.extend(node.outputs)
    return False


def _scales(mul: gs.Node) -> bool:
    return any(isinstance(tensor, gs.Constant) for tensor in mul.inputs)


def _multiplies_weights(node: gs.Node, scanned: set[int]) -> bool:
    return node.op in PRODUCTS and any(_is_weight(tensor, scanned) for tensor in node.inputs)


def _is_weight(tensor: gs.Tensor, scanned: set[int]) -> bool:
    """Whether ``tensor`` is a constant, picked from one, or one of what a Scan takes apart."""
    stored = source(tensor, PICKED)
    return isinstance(stored, gs.Constant) or id(stored) in scanned
