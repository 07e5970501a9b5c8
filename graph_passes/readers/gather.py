"""Reader for weights gathered by id for each token, as our own writer ``gather`` does.

::

    up = MatMul(x (T, 1, 1, H), Gather(W_up (E, H, F), ids (T, K))) + Unsqueeze(Gather(b_up (E, F), ids))
    down = MatMul(act(up), Gather(W_down (E, F, H), ids)) + Unsqueeze(Gather(b_down (E, H), ids))
    out = ReduceSum(down * weights (T, K, 1, 1), axes of K and 1)

The ids may be flat (T K), each token K times. torch's ``W[ids]`` is exported as ``GatherND(W, Unsqueeze(ids, -1))``.
"""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, source
from graph_passes.readers.axes.names import EXPERTS, Axis
from graph_passes.readers.axes.operands import STORED
from graph_passes.readers.parts.batched_ffn import Held, Layout, Product, is_down, read_block
from graph_passes.readers.parts.projection import read_weight
from graph_passes.readers.parts.weighing import MOVES
from graph_passes.record.block import MoEBlock
from graph_passes.routers import Weights
from graph_passes.weights.weight import Weight

FORM = "gather"
LOOKS_FOR = "Gather of stacked expert weights"


class Gathered:
    """Weights (E, in, out) or (E, out, in), of which MatMul reads those with the ids of a token."""

    form = FORM

    def product(self, node: gs.Node, ends: tuple[Axis, Axis]) -> Product | None:
        """A MatMul, of which one operand was gathered."""
        if node.op != "MatMul":
            return None
        for side in (1, 0):
            gather = _gather_of(node.inputs[side], 3)
            if gather is None:
                continue
            kernel = _held(gather.table, ends[::-1] if side == 0 else ends, flipped=side == 0)
            return Product(node, node.inputs[1 - side], kernel, ids=gather.ids)
        return None

    def bias(self, term: gs.Tensor, width: Axis, gates: gs.Tensor | None) -> Held | None:
        """Rows of (E, out), gathered likewise."""
        gather = _gather_of(source(term, MOVES), 2)
        return None if gather is None or gates is not None else _held(gather.table, (width,), flipped=False)


LAYOUT: Layout = Gathered()


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The down projections."""
    return [node for node in graph.nodes if is_down(LAYOUT, node)]


def read(down: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose down projection is ``down``.

    Raises:
        FormError: with the first op that stands elsewhere than in this form.
    """
    return read_block(LAYOUT, down, name, weights)


@dataclasses.dataclass(frozen=True)
class _Gather:
    """Rows of ``table`` with the ``ids``."""

    table: gs.Tensor
    ids: gs.Tensor


def _gather_of(tensor: gs.Tensor, rank: int) -> _Gather | None:
    gather = produced_by(source(tensor, {"Cast", "Identity"}), "Gather", "GatherND")
    ids = None if gather is None else _ids_of(gather)
    if gather is None or ids is None or isinstance(ids, gs.Constant):
        return None
    stored = source(gather.inputs[0], STORED)
    fits = isinstance(stored, gs.Constant) and len(stored.shape) == rank
    return _Gather(gather.inputs[0], ids) if fits else None


def _ids_of(gather: gs.Node) -> gs.Tensor | None:
    """Ids of rows of axis 0; None where something else is gathered."""
    if gather.op == "Gather":
        return gather.inputs[1] if gather.attrs.get("axis", 0) == 0 else None
    column = produced_by(gather.inputs[1], "Unsqueeze")
    return None if column is None else column.inputs[0]


def _held(table: gs.Tensor, rest: tuple[Axis, ...], *, flipped: bool) -> Held:
    def load(weights: Weights, _: int) -> Weight:
        weight = read_weight(table, weights)
        return weight.swap() if flipped else weight

    return Held(table, (EXPERTS, *rest), load)
