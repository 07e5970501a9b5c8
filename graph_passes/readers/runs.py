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

from graph_passes.block import FormError, MoEBlock, Router
from graph_passes.readers.activation import Middle, read_activation
from graph_passes.readers.gathered import gather_of, gathered_from
from graph_passes.readers.interpreter import Interpreter
from graph_passes.readers.layer import Layer, read_ffns, read_projection, run_of
from graph_passes.readers.single_expert import ExpertParts, stack_experts
from graph_passes.readers.trial import Trial, fitted
from graph_passes.readers.weighing import in_dtype_of
from graph_passes.routers import Weights, read_gates, read_slots
from graph_passes.walk import SHAPE_ONLY, produced_by, producer, sink, source

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


def _weighed(concat: gs.Node) -> tuple[gs.Node, gs.Tensor, gs.Tensor] | None:
    """(product, outputs, weights) where the experts' outputs, a bias added, are multiplied with gathered weights."""
    value = sink(concat.outputs[0])
    added = next((node for node in value.outputs if node.op == "Add"), None)
    value = value if added is None else sink(added.outputs[0])
    product = next((node for node in value.outputs if node.op == "Mul"), None)
    if product is None:
        return None
    gate = product.inputs[1] if product.inputs[0] is value else product.inputs[0]
    return None if gather_of(gate) is None else (product, value, gate)


def read(concat: gs.Node, form: str, name: str, weights: Weights) -> MoEBlock:
    """The block whose experts' outputs ``concat`` puts behind one another.

    Raises:
        FormError: with the first op that stands elsewhere than in this form, or the experts that are missing.
    """
    weighed = _weighed(concat)
    assert weighed is not None
    product, value, gate = weighed
    found = _read_experts(value, concat, weights)
    tokens = found.layers[0].whole
    picks = gather_of(tokens), gather_of(gate)
    if picks[0] is None or picks[1] is None:
        raise FormError("the sorted rows are not gathered from tokens", producer(tokens) or tokens)
    hidden, router_weights = gathered_from(picks[0]), source(gathered_from(picks[1]))
    ids = _sorted_ids(picks[1])
    router = _read_router(ids, router_weights, weights)
    trial = Trial(router.weight_EH.shape[0], router.top_k, found.layers[0].inputs, in_order=router.slots is None)
    run = Interpreter(weights, trial.tokens)
    run.give(hidden, trial.hidden_TH)
    run.give(router_weights, fitted(trial.weights_TK, router_weights))
    if router.slots is not None:
        run.give(ids, fitted(trial.ids_TK, ids))
    slots = trial.slots(run.of(gate), picks[1])
    trial.require_tokens(run.of(tokens), slots, picks[0])
    orders = [layer.order(slots, trial, run) for layer in found.layers]
    experts = stack_experts(found.parts(orders))
    out = in_dtype_of(experts.down_EFH, _summed(product))
    rows = trial.outputs(len(slots), found.layers[-1].outputs)
    run.give(value, rows)
    if not np.array_equal(run.of(out), trial.summed(slots, rows * trial.weights_of(slots))):
        raise FormError("the weighed outputs are not added up token by token", producer(out))
    return MoEBlock(
        name=router.scope or name,
        form=form,
        hidden=hidden,
        out=out,
        router=router,
        experts=experts,
        keep=tuple(range(len(orders[0]))),
    )


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


def _sorted_ids(pick: gs.Node) -> gs.Tensor:
    """The router's ids, by whose order ``pick`` gathers weights."""
    order = source(pick.inputs[1], SHAPE_ONLY | {"Concat", "Expand"})
    sort = produced_by(order, "TopK")
    if sort is None or sort.outputs[1] is not order:
        raise FormError("the weights are not gathered in the order of sorted ids", sort or pick)
    return source(sort.inputs[0])


def _read_router(ids: gs.Tensor, router_weights: gs.Tensor, weights: Weights) -> Router:
    """The router; where every token has the same ids it hands over all its scores."""
    if produced_by(ids, "Expand"):
        return read_gates(router_weights, weights)
    return read_slots(ids, router_weights, weights)


def _summed(product: gs.Node) -> gs.Tensor:
    """(T, H): the weighed rows, back in order, added up for each token."""
    tensor = product.outputs[0]
    while True:
        following = next((node for node in tensor.outputs if _reads_rows(node, tensor)), None)
        if following is None:
            raise FormError("the weighed outputs are not summed over the slots of a token", producer(tensor))
        tensor = following.outputs[0]
        if following.op in SUMS:
            return tensor


def _reads_rows(node: gs.Node, tensor: gs.Tensor) -> bool:
    place = SUMS.get(node.op, 0 if node.op in RETURNS else None)
    return place is not None and node.inputs[place] is tensor
