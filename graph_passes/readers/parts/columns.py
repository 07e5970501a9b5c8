"""Prove which expert a gate is for: a column cut out of the gates of all experts, or the sum of the slots with its id.

::

    Slice(gates (T, E), e, e + 1, axis 1)       or Gather, or an output of Split; of gates (E, T) along axis 0
    ReduceSum(Where(Equal(ids (T, K), e), weights (T, K), 0))       or times that mask
"""

import dataclasses
from collections.abc import Callable, Mapping

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import END, SHAPE_ONLY, before_whole_slices, number, operand, produced_by, producer, source
from graph_passes.routers.constants import constant_value

BROADCASTS = SHAPE_ONLY | {"Expand"}
"""Ops that a column may pass before it multiplies."""


PROJECTIONS = frozenset({"Conv", "Gemm", "MatMul", "MatMulNBits"})
"""Ops by whose weights a branch is more than its gate."""


@dataclasses.dataclass(frozen=True)
class Column:
    """The gate of one expert for every token.

    Attributes:
        expert: its id; negative ids count from the last expert.
        gates: the gates (T, E) of all experts that it was cut from; or
        ids: (T, K), of which those that equal ``expert`` count, with
        weights: (T, K).
        axis: of the gates, along which the experts are.
    """

    expert: int
    gates: gs.Tensor | None = None
    ids: gs.Tensor | None = None
    weights: gs.Tensor | None = None
    axis: int = 1

    @property
    def origin(self) -> tuple[int, ...]:
        """The same for all columns of one router."""
        return tuple(id(part) for part in (self.gates, self.ids, self.weights) if part is not None)


def column_of(tensor: gs.Tensor) -> Column | None:
    """``tensor`` as the gate of one expert; None where it is none."""
    column = source(tensor, BROADCASTS)
    node = producer(column)
    rule = None if node is None else _RULES.get(node.op)
    return None if node is None or rule is None else rule(node, column)


def is_projected(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` comes from a projection, its bias stepped over."""
    node = producer(source(tensor, BROADCASTS))
    if node is not None and node.op == "Add":
        term = next((tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)), None)
        node = None if term is None else producer(source(term, BROADCASTS))
    return node is not None and node.op in PROJECTIONS


def _sliced(node: gs.Node, _: gs.Tensor) -> Column | None:
    start, end, axis, step = (number(operand(node, index)) for index in (1, 2, 3, 4))
    if start is None or end is None or (operand(node, 4) is not None and step != 1.0):
        return None
    single = end == start + 1 or (start == -1.0 and end >= END)
    return _cut(node.inputs[0], int(start), 0 if axis is None else int(axis)) if single else None


def _gathered(node: gs.Node, _: gs.Tensor) -> Column | None:
    index = number(node.inputs[1])
    return None if index is None else _cut(node.inputs[0], int(index), node.attrs.get("axis", 0))


def _split(node: gs.Node, column: gs.Tensor) -> Column | None:
    sizes = operand(node, 1)
    given = sizes.values.reshape(-1).tolist() if isinstance(sizes, gs.Constant) else node.attrs.get("split", [1])
    if any(size != 1 for size in given) or (sizes is not None and not isinstance(sizes, gs.Constant)):
        return None
    place = next(index for index, output in enumerate(node.outputs) if output is column)
    return _cut(node.inputs[0], place, node.attrs.get("axis", 0))


def _in_sequence(node: gs.Node, _: gs.Tensor) -> Column | None:
    split, index = produced_by(node.inputs[0], "SplitToSequence"), number(node.inputs[1])
    if split is None or index is None or number(operand(split, 1)) not in (None, 1.0):
        return None
    return _cut(split.inputs[0], int(index), split.attrs.get("axis", 0))


def _cut(gates: gs.Tensor, expert: int, axis: int) -> Column | None:
    """Column ``expert`` of gates (T, E), or row of gates (E, T); what a projection gives is no gates."""
    gates = before_whole_slices(gates)
    if is_projected(gates):
        return None
    if axis != 0:
        return Column(expert, gates=gates, axis=abs(axis))
    turned = produced_by(source(gates, {"Cast", "Identity"}), "Transpose") if axis == 0 else None
    return Column(expert, gates=before_whole_slices(turned.inputs[0])) if turned is not None else None


def _summed(node: gs.Node, _: gs.Tensor) -> Column | None:
    axes = operand(node, 1)
    along = axes.values.tolist() if isinstance(axes, gs.Constant) else node.attrs.get("axes")
    inner = producer(source(node.inputs[0])) if along in ([1], [-1]) else None
    return None if inner is None else _masked(inner, inner.outputs[0])


def _masked(node: gs.Node, _: gs.Tensor) -> Column | None:
    """Weights (T, K) where the id is that of the expert, 0 elsewhere."""
    if node.op == "Where" and constant_value(node.inputs[2]) == 0.0:
        pairs = [(node.inputs[0], node.inputs[1])]
    elif node.op == "Mul":
        pairs = [(node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])]
    else:
        return None
    for mask, weights in pairs:
        equal = produced_by(source(mask), "Equal")
        if equal is not None:
            return _compared(equal, weights)
    return None


def _compared(equal: gs.Node, weights: gs.Tensor) -> Column | None:
    for ids, expert_id in (equal.inputs, reversed(equal.inputs)):
        expert = number(expert_id)
        if expert is not None:
            return Column(int(expert), ids=source(ids), weights=source(weights))
    return None


_RULES: Mapping[str, Callable[[gs.Node, gs.Tensor], Column | None]] = {
    "Gather": _gathered,
    "Mul": _masked,
    "ReduceSum": _summed,
    "SequenceAt": _in_sequence,
    "Slice": _sliced,
    "Split": _split,
    "Where": _masked,
}
