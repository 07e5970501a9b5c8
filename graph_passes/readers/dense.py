"""Reader for experts side by side in two-dimensional weights, as our own writer ``dense`` puts them.

::

    up = Gemm(x (T, H), W_up (H, E F)) + b_up (E F)
    gated = Reshape(Reshape(act(up), (-1, E, F)) * gates (T, E, 1), (-1, E F))
    out = MatMul(gated, W_down (E F, H)) + MatMul(gates, b_down (E, H))
"""

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import is_weight, produced_by, producer, source
from graph_passes.readers.axes.names import ELEMENTWISE, EXPERTS, HIDDEN, WIDTH, Axis
from graph_passes.readers.axes.operands import STORED
from graph_passes.readers.parts.batched_ffn import (
    DOWN,
    FURTHEST_PROJECTION,
    Held,
    Layout,
    Product,
    reaches_product,
    read_block,
)
from graph_passes.readers.parts.projection import read_weight
from graph_passes.readers.parts.weighing import MOVES
from graph_passes.record.block import MoEBlock
from graph_passes.routers import Weights
from graph_passes.weights.weight import Weight

FORM = "dense"
LOOKS_FOR = "product of gated channels of all experts with one matrix"


class SideBySide:
    """Weights (H, E F) and (E F, H), the experts one after the other."""

    form = FORM

    def product(self, node: gs.Node, ends: tuple[Axis, Axis]) -> Product | None:
        """A Gemm or MatMul by a matrix."""
        if node.op not in ("Gemm", "MatMul") or not is_weight(source(node.inputs[1], STORED), 2):
            return None
        tensor, flipped = node.inputs[1], bool(node.attrs.get("transB", 0))
        along = 0 if ends == DOWN else 1

        def load(weights: Weights, experts: int) -> Weight:
            weight = read_weight(tensor, weights)
            stored = weight.swap() if weight.swapped else weight
            if flipped != weight.swapped:  # (out, in) as it lies: cut what lies, swap the result
                return stored.cut(experts, 1 - along).swap()
            return stored.cut(experts, along)

        wide = tuple(EXPERTS + end if end == WIDTH else end for end in ends)
        return Product(node, node.inputs[0], Held(tensor, wide[::-1] if flipped else wide, load))

    def bias(self, term: gs.Tensor, width: Axis, gates: gs.Tensor | None) -> Held | None:
        """A constant (E F), or the gates' product with one (E, H)."""
        if width == HIDDEN:
            return None if gates is None else _gated_bias(term, gates)
        if not is_weight(term, 1):
            return None
        return Held(term, (EXPERTS + WIDTH,), lambda weights, experts: weights.of(term).cut(experts))


LAYOUT: Layout = SideBySide()


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The products that read gated channels of experts."""
    return [node for node in graph.nodes if _reads_gated(node)]


def read(down: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose down projection is ``down``.

    Raises:
        FormError: with the first op that stands elsewhere than in this form.
    """
    return read_block(LAYOUT, down, name, weights)


def _gated_bias(term: gs.Tensor, gates: gs.Tensor) -> Held | None:
    product = produced_by(source(term), "MatMul")
    if product is None or source(product.inputs[0], MOVES) is not source(gates, MOVES):
        return None
    table = product.inputs[1]
    if not is_weight(table, 2):
        return None
    return Held(table, (EXPERTS, HIDDEN), lambda weights, _: weights.of(table))


def _reads_gated(node: gs.Node) -> bool:
    """Whether ``node`` reads channels that were taken apart by expert, gated, and put side by side again."""
    product = LAYOUT.product(node, DOWN)
    flat = None if product is None else produced_by(product.x, "Reshape")
    front, seen = [] if flat is None else [flat.inputs[0]], 0
    while front and seen < FURTHEST_PROJECTION:
        inner, seen = producer(front.pop()), seen + 1
        if inner is None or inner.op not in ELEMENTWISE:
            continue
        if inner.op == "Mul" and any(_is_gating(*pair) for pair in (inner.inputs, reversed(inner.inputs))):
            return True
        front.extend(inner.inputs)
    return False


def _is_gating(channels: gs.Tensor, gates: gs.Tensor) -> bool:
    """Whether channels of a projection, taken apart, are multiplied by what has one number for several."""
    taken_apart = produced_by(source(channels, {"Cast"}), "Reshape") is not None
    column = produced_by(source(gates, {"Cast"}), "Unsqueeze", "Reshape") is not None
    return taken_apart and column and reaches_product(LAYOUT, channels)
