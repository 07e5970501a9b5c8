"""Reader for one branch an expert, each computing every token, weighed by that expert's column of the gates.

::

    out = zeros + gates[:, 0] * ffn_0(x) + gates[:, 1] * ffn_1(x) + ...         Adds, a Sum, or Concat and ReduceSum
    out = ReduceSum(gates * Concat(Unsqueeze(ffn_0(x)), ...), axis of E)

The gates may multiply what the branches read instead. Which expert a branch is follows from its column, or from its
place beside the gates; never from its place in the graph.
"""

import dataclasses
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, source
from graph_passes.readers.axes.axis_reader import AxisReader
from graph_passes.readers.axes.names import EXPERTS, HIDDEN, SLOTS, TOKENS
from graph_passes.readers.axes.operands import axes_of
from graph_passes.readers.parts.branches import CASTS, branch_sums, silent_terms_of, terms_of
from graph_passes.readers.parts.columns import Column, column_of
from graph_passes.readers.parts.layout import scope_in
from graph_passes.readers.parts.single_expert import ExpertParts, read_ffn, require_unbiased, stack_experts
from graph_passes.readers.parts.weighing import check_tokens, follow, in_dtype_of, route, sum_of
from graph_passes.record.block import ON_INPUT, ON_OUTPUT, Experts, FormError, MoEBlock, Router
from graph_passes.routers import Weights, read_gates, read_slots

FORM = "masked_loop"
LOOKS_FOR = "sum of branches, each with a column of the gates,"


@dataclasses.dataclass(frozen=True)
class Branch:
    """One expert's FFN in the graph.

    Attributes:
        tokens: what it reads, before a gate multiplied that.
        parts: the FFN.
        column: the gate, where it stands in the branch.
        weights_on: where the gate multiplies.
    """

    tokens: gs.Tensor
    parts: ExpertParts
    column: Column | None
    weights_on: str


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The nodes at which all branches have come together: the last Add, a Sum, or a Concat."""
    return branch_sums(graph)


def read(total: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose branches meet in ``total``.

    Raises:
        FormError: with the first op that stands elsewhere than in this form, or the experts that have no branch.
    """
    if total.op == "Concat":
        return _read_stack(total, name, weights)
    branches = [_read_branch(term, weights) for term in terms_of(total)]
    router = _route(branches, total, weights)
    if len(branches) < router.weight_EH.shape[0]:
        branches, router = _with_silent(branches, router, total, weights)
    ordered = _in_order(branches, router, total)
    experts = stack_experts([branch.parts for branch in ordered])
    return _block(ordered, router, experts, in_dtype_of(experts.down_EFH, total.outputs[0]), name)


def _read_stack(concat: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose branches are stacked by ``concat``; gates are in them, or multiply the stack."""
    weighing = follow(concat.outputs[0], None, lambda _: False)
    along, outputs = _stacked(concat)
    axes = AxisReader(EXPERTS if weighing.ids is None else SLOTS)
    if weighing.gates is None:
        branches = [_read_branch(source(output, CASTS), weights) for output in outputs]
        router = _route(branches, concat, weights)
        branches = _in_order(branches, router, concat)
    else:
        router = route(weighing.gates, weighing.ids, axes, weights)
        if len(outputs) != router.weight_EH.shape[0]:
            raise FormError(
                f"the router chooses among {router.weight_EH.shape[0]} experts, the graph computes {len(outputs)}",
                concat,
            )
        branches = [Branch(*read_ffn(output, weights), None, ON_OUTPUT) for output in outputs]
    experts = stack_experts([branch.parts for branch in branches])
    for axis, length in zip((EXPERTS, HIDDEN), (len(outputs), router.weight_EH.shape[1]), strict=True):
        axes.size(axis, length)
    stacked = [TOKENS, HIDDEN]
    stacked.insert(along % 3, EXPERTS)
    axes.know(concat.outputs[0], *stacked)
    return _block(branches, router, experts, sum_of(weighing, axes, experts.down_EFH), name)


def _stacked(concat: gs.Node) -> tuple[int, list[gs.Tensor]]:
    """The axis along which ``concat`` stacks, and what."""
    along = int(concat.attrs["axis"])
    parts = []
    for tensor in concat.inputs:
        node = produced_by(tensor, "Unsqueeze")
        if node is None or [axis % 3 for axis in axes_of(node)] != [along % 3]:
            raise FormError("the experts' outputs are not put side by side along an axis of their own", concat)
        parts.append(node.inputs[0])
    return along, parts


def _read_branch(term: gs.Tensor, weights: Weights) -> Branch:
    weighed = _weighed(producer(term))
    if weighed is not None:
        column, output = weighed
        return Branch(*read_ffn(output, weights), column, ON_OUTPUT)
    tokens, parts = read_ffn(term, weights)
    weighed = _weighed(producer(tokens))
    if weighed is None:
        raise FormError("no gate of a single expert multiplies a branch", producer(term) or term)
    return Branch(weighed[1], parts, weighed[0], ON_INPUT)


def _weighed(node: gs.Node | None) -> tuple[Column, gs.Tensor] | None:
    """(gate, what it multiplies)."""
    if node is not None and node.op == "Mul":
        for gate, value in (node.inputs, reversed(node.inputs)):
            column = column_of(gate)
            if column is not None:
                return column, value
    return None


def _route(branches: Sequence[Branch], total: gs.Node, weights: Weights) -> Router:
    columns = [branch.column for branch in branches if branch.column is not None]
    first = columns[0]
    if any(column.origin != first.origin for column in columns):
        raise FormError("the branches take their gates from different routers", total)
    if first.axis != 1:
        raise FormError(f"the gates have their experts on axis {first.axis}, expected (tokens, experts)", total)
    if first.ids is not None and first.weights is not None:
        return read_slots(first.ids, first.weights, weights)
    assert first.gates is not None
    return read_gates(first.gates, weights)


def _with_silent(
    branches: list[Branch], router: Router, total: gs.Node, weights: Weights
) -> tuple[list[Branch], Router]:
    """The branches whose gate is a constant 0 too, for the rows of the router that lead to no other."""
    count = router.weight_EH.shape[0]
    reached = {branch.column.expert % count for branch in branches if branch.column is not None}
    free = [expert for expert in range(count) if expert not in reached]
    silent = [read_ffn(output, weights) for output in silent_terms_of(total)]
    if len(silent) != len(free) or branches[0].column is None:
        return branches, router
    columns = [dataclasses.replace(branches[0].column, expert=expert) for expert in free]
    added = [Branch(*ffn, column, ON_OUTPUT) for ffn, column in zip(silent, columns, strict=True)]
    return [*branches, *added], dataclasses.replace(router, leads_to=tuple(sorted(reached)))


def _in_order(branches: Sequence[Branch], router: Router, total: gs.Node) -> list[Branch]:
    """The branches by the ids of their experts: all that the router chooses among, perhaps more."""
    count = router.weight_EH.shape[0]
    found: dict[int, Branch] = {}
    for branch in branches:
        assert branch.column is not None
        expert = branch.column.expert + (count if branch.column.expert < 0 else 0)
        if expert in found:
            raise FormError(f"expert {expert} has two branches", branch.parts.down.node)
        found[expert] = branch
    lost = sorted(set(range(count)) - set(found))
    if lost:
        raise FormError(
            f"the router chooses among {count} experts, the graph computes experts {sorted(found)} only: "
            f"the exporter lost experts {lost}",
            total,
        )
    return [found[expert] for expert in sorted(found)]


def _block(branches: Sequence[Branch], router: Router, experts: Experts, out: gs.Tensor, name: str) -> MoEBlock:
    first = branches[0]
    for branch in branches:
        if branch.tokens is not first.tokens or branch.weights_on != first.weights_on:
            raise FormError("the branches read different values", branch.parts.up.node)
    check_tokens(first.tokens)
    if first.weights_on == ON_INPUT:
        require_unbiased(experts, first.parts.down.node)
    return MoEBlock(
        name=scope_in(first.parts.down.node.inputs[1].name) or router.scope or name,
        form=FORM,
        hidden=first.tokens,
        out=out,
        router=router,
        experts=experts,
        keep=tuple(range(len(branches))),
        weights_on=first.weights_on,
    )
