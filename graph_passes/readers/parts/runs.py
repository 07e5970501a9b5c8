"""Experts whose tokens were sorted by expert: each computes a run of rows, and the rows are put back in order.

::

    order = argsort(ids)                        a TopK of everything
    rows = hidden[order // K]
    y = Concat(expert_e(run e of rows))         or projection by projection, the activation on all rows at once
    out = sum over slots of (y * weights[order])[inverse of order]

What the readers of these forms share: only how a run is taken differs. Whether the runs are those of the counted ids,
which expert each belongs to, and whether rows return to their tokens, is found out by trying it (see `Trial`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, produced_by, producer, sink, source
from graph_passes.readers.parts.activation import Middle, read_activation
from graph_passes.readers.parts.layer import Layer, read_ffns, read_projection, run_of
from graph_passes.readers.parts.single_expert import ExpertParts, require_unbiased, scope_of, stack_experts
from graph_passes.readers.parts.weighing import in_dtype_of
from graph_passes.readers.trial.gathered import GATHERS, gather_of, gathered_from
from graph_passes.readers.trial.interpreter import Interpreter, tokens_of
from graph_passes.readers.trial.trial import Trial, fitted, told_apart
from graph_passes.record.block import ON_INPUT, ON_OUTPUT, FormError, MoEBlock, Router
from graph_passes.routers import Weights, read_gates, read_slots
from graph_passes.routers.silence import strip_led

FURTHEST_RUN = 40
"""Values that are looked at between an expert's output and the run of tokens that it reads."""

RETURNS = SHAPE_ONLY | {"Expand", "Gather", "GatherND", "Transpose"}
"""Ops that put rows back in order."""

SUMS = {"ReduceSum": 0, "ScatterElements": 2, "ScatterND": 2}
"""Ops that add up the slots of a token, and which input the rows are."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The experts between the sorted rows and ``layers[-1]``.

    Attributes:
        layers: up (or gate and up), gate where it has its own, down; or one layer of whole FFNs.
        middle: between the projections; None where ``ffns`` are whole.
        ffns: by branch.
    """

    layers: tuple[Layer, ...]
    middle: Middle | None = None
    ffns: tuple[ExpertParts, ...] = ()

    def parts(self, orders: Sequence[Sequence[int]]) -> list[ExpertParts]:
        """The experts by id, whose branches in each layer are ``orders[layer][expert]``."""
        if self.middle is None:
            return [self.ffns[branch] for branch in orders[0]]
        projections = [
            [layer.linear(expert, branch) for expert, branch in enumerate(order)]
            for layer, order in zip(self.layers, orders, strict=True)
        ]
        up, *gate, down = projections
        gates = gate[0] if gate else [None] * len(up)
        middle = self.middle
        return [
            ExpertParts(*linears, middle.gating, middle.activation) for linears in zip(up, gates, down, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Weighed:
    """The experts' outputs ``value``, and what goes back to the tokens: ``rows = value * gate``, or as they are."""

    value: gs.Tensor
    rows: gs.Tensor
    gate: gs.Tensor | None


@dataclasses.dataclass(frozen=True)
class Routed:
    """A router, its ids and weights (``values``), what the experts read, and the weights in the order of the rows."""

    router: Router
    hidden: gs.Tensor
    ids: gs.Tensor
    values: gs.Tensor
    gate: gs.Tensor


def anchors(graph: gs.Graph, takers: Sequence[str]) -> list[gs.Node]:
    """The nodes that put the experts' outputs behind one another, whose runs are taken by ``takers``."""
    concats = [node for node in graph.nodes if node.op == "Concat" and node.attrs.get("axis") in (0, -2)]
    return [node for node in concats if _weighed(node) is not None and _taker(node) in takers]


def _taker(concat: gs.Node) -> str | None:
    """The op that takes the run of which the first branch of ``concat`` is computed."""
    front, seen = [concat.inputs[0]], 0
    while front and seen < FURTHEST_RUN:
        tensor, seen = front.pop(), seen + 1
        node = producer(tensor)
        if node is None:
            continue
        if run_of(tensor) is not None:
            return str(node.op)
        front += [value for value in node.inputs if isinstance(value, gs.Variable)]
    return None


def _weighed(concat: gs.Node) -> Weighed | None:
    """What becomes of the experts' outputs, a bias added; None where they are no outputs of experts."""
    value = sink(concat.outputs[0])
    added = next((node for node in value.outputs if node.op == "Add"), None)
    value = value if added is None else sink(added.outputs[0])
    product = next((node for node in value.outputs if node.op == "Mul"), None)
    if product is not None:
        gate = product.inputs[1] if product.inputs[0] is value else product.inputs[0]
        return None if gather_of(gate) is None else Weighed(value, product.outputs[0], gate)
    returned = any(_reads_rows(node, value) and node.op in (*GATHERS, *SUMS) for node in value.outputs)
    return Weighed(value, value, None) if returned else None


def read(concat: gs.Node, form: str, name: str, weights: Weights) -> MoEBlock:
    """The block whose experts' outputs ``concat`` puts behind one another.

    Raises:
        FormError: with the first op that stands elsewhere than in this form, or the experts that are missing.
    """
    weighed = _weighed(concat)
    assert weighed is not None
    found = _read_experts(weighed.value, concat, weights)
    routed = _read_routed(found.layers[0].whole, weighed.gate, weights)
    total = _summed(weighed.rows)
    orders = _try(found, weighed, routed, total, weights)
    parts = found.parts(orders)
    experts = stack_experts(parts)
    if weighed.gate is None:
        require_unbiased(experts, concat)
    return MoEBlock(
        name=scope_of(parts[0]) or routed.router.scope or name,
        form=form,
        hidden=routed.hidden,
        out=in_dtype_of(experts.down_EFH, total),
        router=routed.router,
        experts=experts,
        keep=tuple(range(len(orders[0]))),
        weights_on=ON_INPUT if weighed.gate is None else ON_OUTPUT,
    )


def _try(found: Found, weighed: Weighed, routed: Routed, total: gs.Tensor, weights: Weights) -> list[list[int]]:
    """For each layer and expert the number of its branch.

    Raises:
        FormError: a branch reads or gives something else than its expert would, or an expert has no branch.
    """
    router, on_input = routed.router, weighed.gate is None
    in_order = router.slots is None
    experts, top_k = (router.columns,) * 2 if in_order else (router.weight_EH.shape[0], router.top_k)
    leads_to, aliases = (None, ()) if in_order else (router.leads_to, router.aliases)
    tokens = tokens_of(routed.hidden)
    orders = []  # runs are found by counting: no two experts may always have the same counts
    for loads in told_apart(experts, None if tokens is None else tokens * top_k):
        trial = Trial(
            experts, top_k, 1, tokens=tokens, loads=loads, in_order=in_order, leads_to=leads_to, aliases=aliases
        )
        run = _started(routed, trial, weights)
        slots = trial.slots(run.of(routed.gate), producer(routed.gate))
        orders.append([layer.order(slots, trial, run) for layer in found.layers])
    if any(order != orders[0] for order in orders):
        raise FormError("which expert a branch is depends on how many tokens it gets", found.layers[0].concat)
    first, last = found.layers[0], found.layers[-1]
    trial = Trial(experts, top_k, first.inputs, tokens=tokens, in_order=in_order)
    run = _started(routed, trial, weights)
    slots = trial.slots(run.of(routed.gate), producer(routed.gate))
    trial.require_tokens(run.of(first.whole), slots, producer(first.whole), weighed=on_input)
    rows = trial.outputs(len(slots), last.outputs)
    run.give(weighed.value, rows)
    if not np.array_equal(run.of(total), trial.summed(slots, rows if on_input else rows * trial.weights_of(slots))):
        raise FormError("the weighed outputs are not added up token by token", producer(total))
    return orders[0]


def _started(routed: Routed, trial: Trial, weights: Weights) -> Interpreter:
    """Knows what the router decided in ``trial``."""
    run = Interpreter(weights, trial.tokens)
    run.give(routed.hidden, trial.hidden_TH)
    run.give(routed.values, fitted(trial.weights_TK, routed.values))
    if routed.router.slots is not None:
        ids = strip_led(routed.ids, routed.values).ids
        run.give(ids, fitted(trial.ids_TK, ids))
    return run


def _read_experts(value: gs.Tensor, concat: gs.Node, weights: Weights) -> Found:
    whole = read_ffns(concat, weights)
    if whole is not None:
        layer, ffns = whole
        return Found((layer,), ffns=ffns)
    down = read_projection(value, weights)
    middle = read_activation(down.whole)
    first = [middle.projection] if middle.gate is None else [middle.projection, middle.gate]
    layers = [read_projection(tensor, weights) for tensor in first]
    if layers[-1].whole is not layers[0].whole:
        raise FormError("gate and up read different rows", layers[-1].concat)
    return Found((*layers, down), middle)


def _read_routed(tokens: gs.Tensor, gate: gs.Tensor | None, weights: Weights) -> Routed:
    """Where the sorted rows ``tokens`` come from, and their weights: ``gate``, or one side of the product they are."""
    product = None if gate is not None else produced_by(tokens, "Mul")
    sides = [(tokens, gate)] if product is None else [tuple(product.inputs), tuple(reversed(product.inputs))]
    refusal = FormError("the sorted rows are not gathered from tokens", producer(tokens) or tokens)
    for rows, weight in sides:
        picks = gather_of(rows), None if weight is None else gather_of(weight)
        if picks[0] is None or picks[1] is None:
            continue
        try:
            ids, values = _sorted_ids(picks[1]), source(gathered_from(picks[1]))
            return Routed(_read_router(ids, values, weights), gathered_from(picks[0]), ids, values, weight)
        except FormError as error:
            refusal = error
    raise refusal


def _sorted_ids(pick: gs.Node) -> gs.Tensor:
    """The router's ids, by whose order ``pick`` gathers weights."""
    order = source(pick.inputs[1], SHAPE_ONLY | {"Concat", "Expand"})
    sort = produced_by(order, "TopK")
    if sort is None or sort.outputs[1] is not order:
        raise FormError("the weights are not gathered in the order of sorted ids", sort or pick)
    return source(sort.inputs[0])


def _read_router(ids: gs.Tensor, values: gs.Tensor, weights: Weights) -> Router:
    """The router; where every token has the same ids it hands over all its scores."""
    return read_gates(values, weights) if produced_by(ids, "Expand") else read_slots(ids, values, weights)


def _summed(rows: gs.Tensor) -> gs.Tensor:
    """(T, H): ``rows``, back in order, added up for each token."""
    while True:
        following = next((node for node in rows.outputs if _reads_rows(node, rows)), None)
        if following is None:
            raise FormError("the weighed outputs are not summed over the slots of a token", producer(rows))
        rows = following.outputs[0]
        if following.op in SUMS:
            return rows


def _reads_rows(node: gs.Node, tensor: gs.Tensor) -> bool:
    place = SUMS.get(node.op, 0 if node.op in RETURNS else None)
    return place is not None and node.inputs[place] is tensor
