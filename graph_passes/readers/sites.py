"""Where a graph routes: every top-k or argmax that ranks some function of a projection by a constant matrix."""

import dataclasses
from collections.abc import Callable, Mapping

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, is_weight, producer, source
from graph_passes.readers.axes.operands import STORED
from graph_passes.record.block import place_of
from graph_passes.routers import block_scope

RANKING = {"TopK": 1, "ArgMax": 0}
"""Ops that choose experts, and which output holds the ids."""

ELEMENTWISE = frozenset(
    {"Abs", "Add", "CastLike", "Clip", "Div", "Exp", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Relu", "Sigmoid"}
    | {"Softmax", "Softplus", "Sqrt", "Sub", "Tanh", "Where"}
)
"""What a router may do to its logits before it ranks them."""

PACKED = "MatMulNBits"
"""ONNX Runtime's product by a matrix of which several values share a byte."""

FURTHEST_ROUTER = 40
"""Values that are looked at between a top-k and its projection."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A router that was noticed, whatever becomes of its choice.

    Attributes:
        position: of its projection in the graph.
        projection: the product that gives the logits.
        ranking: the first node that ranks them.
        layer: path of the MoE block, as far as the graph has it.
    """

    position: int
    projection: gs.Node
    ranking: gs.Node
    layer: str


def find_sites(graph: gs.Graph, order: Mapping[int, int]) -> list[Site]:
    """The routers of ``graph``, one for each projection, in graph order; ``order`` gives the positions of nodes."""
    found: dict[int, Site] = {}
    for node in graph.nodes:
        ids = RANKING.get(node.op)
        if ids is None or node.domain not in (None, "") or not node.outputs[ids].outputs:
            continue
        projection = projection_before(node.inputs[0])
        if projection is not None and id(projection) not in found:
            layer = block_scope(projection.inputs[1].name) or f"at {place_of(node)}"
            found[id(projection)] = Site(order[id(projection)], projection, node, layer)
    return sorted(found.values(), key=lambda site: site.position)


def _is_matrix(tensor: gs.Tensor) -> bool:
    return is_weight(tensor, 2)


def projection_before(tensor: gs.Tensor, is_kernel: Callable[[gs.Tensor], bool] = _is_matrix) -> gs.Node | None:
    """The product behind logits, biases and masks stepped over; ``is_kernel`` says what it multiplies by."""
    front, seen = [source(tensor)], 0
    while front and seen < FURTHEST_ROUTER:
        node, seen = producer(front.pop()), seen + 1
        if node is None:
            continue
        if _projects(node, is_kernel):
            return node
        if node.op in SHAPE_ONLY | ELEMENTWISE:
            front.extend(node.inputs)
    return None


def _projects(node: gs.Node, is_kernel: Callable[[gs.Tensor], bool]) -> bool:
    """Whether ``node`` is a product by a kernel."""
    if node.op == PACKED:
        return len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant)
    is_product = node.op in ("Gemm", "MatMul") or (node.op == "Einsum" and len(node.inputs) == 2)
    return is_product and is_kernel(_kernel(node))


def _kernel(projection: gs.Node) -> gs.Tensor:
    """The weight, which an unoptimised export still transposes, and a quantised one dequantises."""
    return source(projection.inputs[1], STORED)
