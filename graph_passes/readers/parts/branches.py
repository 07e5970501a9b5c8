"""Find where the branches of experts come together, in one walk over a graph."""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, source
from graph_passes.readers.axes.names import ELEMENTWISE, PARTS
from graph_passes.readers.parts.columns import PROJECTIONS, column_of, is_projected
from graph_passes.readers.parts.weighing import MOVES, follow
from graph_passes.routers.constants import constant_value

SUMS = frozenset({"ReduceSum", "Einsum", "MatMul"})
CASTS = frozenset({"Cast", "Identity"})


@dataclasses.dataclass(frozen=True)
class Mark:
    """What is computed for one expert alone; ``projected`` where that passed a weight."""

    expert: int
    projected: bool


def branch_sums(graph: gs.Graph) -> list[gs.Node]:
    """The nodes in which all branches of a block are joined: the last Add or Sum, or a Concat.

    Only what was multiplied by the gate of one expert and by weights is a branch, so that other sums are left alone.
    """
    marks: dict[int, Mark] = {}
    joins: dict[int, gs.Node] = {}
    for node in graph.nodes:
        if _joins(node, marks, joins) or _stacks(node, marks):
            joins[id(node.outputs[0])] = node
        elif (mark := _mark(node, marks)) is not None:
            marks.update((id(output), mark) for output in node.outputs)
    inner = {id(source(tensor, CASTS)) for node in joins.values() for tensor in node.inputs}
    return [node for output, node in joins.items() if output not in inner]


def terms_of(total: gs.Node) -> list[gs.Tensor]:
    """What Adds and Sums add up to the output of ``total``, but zeros; what was added first comes first."""
    return [term for term in _terms(total) if constant_value(term) != 0.0]


def silent_terms_of(total: gs.Node) -> list[gs.Tensor]:
    """What is multiplied by a constant 0 before ``total`` adds it."""
    products = [produced_by(term, "Mul") for term in _terms(total) if constant_value(term) == 0.0]
    factors = [[x for x in node.inputs if constant_value(x) != 0.0] for node in products if node is not None]
    return [others[0] for others in factors if others]


def _terms(total: gs.Node) -> list[gs.Tensor]:
    terms, front = [], [total]
    while front:
        for tensor in front.pop().inputs:
            term = source(tensor, CASTS)
            node = produced_by(term, "Add", "Sum")
            if node is not None and not any(isinstance(operand, gs.Constant) for operand in node.inputs):
                front.append(node)
            else:
                terms.append(term)
    return terms[::-1]


def _joins(node: gs.Node, marks: dict[int, Mark], joins: dict[int, gs.Node]) -> bool:
    """Whether ``node`` adds branches of different experts, or sums of such, and nothing else."""
    if node.op not in ("Add", "Sum"):
        return False
    operands = [source(tensor, CASTS) for tensor in node.inputs]
    found = [marks.get(id(tensor)) for tensor in operands]
    experts = {mark.expert for mark in found if mark is not None and mark.projected}
    sums = sum(id(tensor) in joins for tensor in operands)
    if not experts and not sums:
        return False
    others = [tensor for tensor, mark in zip(operands, found, strict=True) if mark is None and id(tensor) not in joins]
    return all(constant_value(tensor) == 0.0 for tensor in others) and len(experts) + sums + len(others) > 1


def _stacks(node: gs.Node, marks: dict[int, Mark]) -> bool:
    """Whether ``node`` puts branches of different experts side by side, or outputs of FFNs that are weighed there."""
    if node.op != "Concat" or not _may_stack(node, marks):
        return False
    weighing = follow(node.outputs[0], None, lambda _: False)
    weighed = weighing.gates is not None or id(node.inputs[0]) in marks
    return weighed and produced_by(weighing.sums[0], *SUMS) is not None


def _may_stack(concat: gs.Node, marks: dict[int, Mark]) -> bool:
    found = [marks.get(id(tensor)) for tensor in concat.inputs]
    experts = {mark.expert for mark in found if mark is not None and mark.projected}
    if experts:
        return len(experts) == len(concat.inputs)
    parts = [produced_by(tensor, "Unsqueeze") for tensor in concat.inputs]
    return len(parts) > 1 and all(part is not None and is_projected(part.inputs[0]) for part in parts)


def _mark(node: gs.Node, marks: dict[int, Mark]) -> Mark | None:
    if node.op not in ELEMENTWISE | PARTS | MOVES | PROJECTIONS:
        return None
    own = {mark for tensor in node.inputs if (mark := marks.get(id(tensor))) is not None}
    if len(own) == 1:
        mark = own.pop()
        return Mark(mark.expert, mark.projected or node.op in PROJECTIONS)
    if node.op == "Mul" and not own:
        for gate, value in (node.inputs, reversed(node.inputs)):
            column = column_of(gate)
            if column is not None:
                return Mark(column.expert, is_projected(value))
    return None
