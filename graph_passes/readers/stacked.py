"""Reader for experts stacked in three-dimensional weights, of which every one computes every token.

::

    up = MatMul(tokens (T, H), (1, T, H) or (E, T, H), W_up (E, H, F))        or Einsum with any subscripts
    down = MatMul(act(up), W_down (E, F, H))
    out = ReduceSum(down * gates, axis of E)                                  or Einsum, or MatMul by the gates
"""

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, source
from graph_passes.readers.axes.names import EXPERTS, ONE, Axes, Axis
from graph_passes.readers.axes.operands import STORED, subscripts
from graph_passes.readers.parts.batched_ffn import Held, Layout, Product, is_down, read_block
from graph_passes.readers.parts.projection import read_weight
from graph_passes.record.block import FormError, MoEBlock
from graph_passes.routers import Weights
from graph_passes.weights.weight import Weight

FORM = "stacked"
LOOKS_FOR = "product of every token with stacked expert weights"


class Stacked:
    """Weights (E, in, out) or (E, out, in) as operands of MatMul or Einsum."""

    form = FORM

    def product(self, node: gs.Node, ends: tuple[Axis, Axis]) -> Product | None:
        """A MatMul or Einsum, of which one operand is a stacked weight."""
        if node.op not in ("MatMul", "Einsum") or len(node.inputs) != 2:
            return None
        side = next((side for side in (1, 0) if _is_stacked(node.inputs[side])), None)
        flipped = None if side is None else _is_flipped(node, side)
        if side is None or flipped is None:
            return None
        tensor = node.inputs[side]

        def load(weights: Weights, _: int) -> Weight:
            weight = read_weight(tensor, weights)
            return weight.swap() if flipped else weight

        axes = (EXPERTS, *(reversed(ends) if flipped else ends))
        return Product(node, node.inputs[1 - side], Held(tensor, axes, load))

    def bias(self, term: gs.Tensor, width: Axis, gates: gs.Tensor | None) -> Held | None:
        """A constant (E, out), perhaps with axes of length 1; or the gates' product with one."""
        product = None if gates is None else produced_by(source(term), "MatMul")
        if product is not None:
            return self.bias(product.inputs[1], width, None)
        tensor = source(term)
        if not isinstance(tensor, gs.Constant) or len(tensor.shape) < 2:
            return None
        sizes = list(tensor.shape)

        def load(weights: Weights, experts: int) -> Weight:
            weight = read_weight(tensor, weights)
            if [size for size in sizes if size != 1] != [size for size in (experts, sizes[-1]) if size != 1]:
                raise ValueError(f"a bias has shape {sizes}")
            return _flat(weight, experts)

        return Held(tensor, _bias_axes(sizes, width), load)


LAYOUT: Layout = Stacked()


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The down projections."""
    return [node for node in graph.nodes if is_down(LAYOUT, node)]


def read(down: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose down projection is ``down``.

    Raises:
        FormError: with the first op that stands elsewhere than in this form.
    """
    return read_block(LAYOUT, down, name, weights)


def _is_stacked(tensor: gs.Tensor) -> bool:
    stored = source(tensor, STORED)
    return isinstance(stored, gs.Constant) and len(stored.shape) == 3


def _is_flipped(node: gs.Node, side: int) -> bool | None:
    """Whether the weight at ``side`` is (E, out, in); None where the experts are not its first axis."""
    if node.op == "MatMul":
        return side == 0
    try:
        terms, _ = subscripts(node)
    except FormError:
        return None
    kernel, other = terms[side], terms[1 - side]
    given = [letter not in other for letter in kernel]
    if len(kernel) != 3 or sum(given[1:]) != 1:
        return None
    return given[1]


def _bias_axes(sizes: list[int], width: Axis) -> Axes:
    """Of a bias (E, out): the last axis is its width, the first other that is not of length 1 the experts'."""
    experts = next((index for index, size in enumerate(sizes[:-1]) if size != 1), 0)
    return (*(EXPERTS if index == experts else ONE for index in range(len(sizes) - 1)), width)


def _flat(weight: Weight, experts: int) -> Weight:
    if len(weight.shape) == 2:
        return weight
    shape = (experts, weight.shape[-1])
    stacked = weight if weight.shape[0] == experts else weight.map(shape, lambda array: array.reshape(shape)).cached()
    return stacked.map(shape, lambda array: array.reshape(len(array), -1), row_wise=True)
