"""Router tensors as extra outputs, in one shape whatever the form: for calibration and for parity."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import FLOAT, Emitter
from graph_passes.record.block import MoEBlock, Router
from graph_passes.weights.weight import from_array
from graph_passes.writers.groups import UNSELECTABLE
from graph_passes.writers.routing import Routing, columns_of, gates_of, routing_on

OBSERVED = "observed"

Mask = np.ndarray[tuple[int], np.dtype[np.float32]]


def is_observable(block: MoEBlock) -> bool:
    """Whether its gates are one for each of its experts: not where a graph computes some whose gates it drops."""
    return block.router.leads_to is None or len(block.router.leads_to) == block.num_experts


def observe_routing(
    graph: gs.Graph,
    emitter: Emitter,
    block: MoEBlock,
    routing: Routing,
    excluded: Sequence[int] = (),
    silent: Sequence[int] = (),
    counted_for: Sequence[int] = (),
) -> tuple[str, str]:
    """Add two outputs for ``block``; their names.

    ``<name>/observed/gates`` (T, E): the weight of each expert for each token, 0 where not selected, and for those in
    ``silent``; or for each expert the one of ``counted_for`` that its own gate is added to.
    ``<name>/observed/scores`` (T, E): what top-k ranks, -inf for the experts in ``excluded``. What rows of the router
    score that lead to no expert stands behind: they decide the choice too.
    """
    emitter, experts = emitter.within(OBSERVED), block.num_experts
    if routing.fused is not None:
        routing = routing_on(emitter, routing.fused, routing.ranked_TE)
    gates = gates_of(emitter, _in_float32(emitter, routing), block)
    scores = emitter.emit("Cast", routing.ranked_TE, label="ranked", to=FLOAT)
    if block.router.leads_to is not None:
        led = block.router.leads_to
        others = [row for row in range(block.router.weight_EH.shape[0]) if row not in led]
        scores = columns_of(emitter, scores, [*led, *others], "ranked_experts_first")
    if excluded:
        scores = emitter.emit("Add", scores, emitter.array("mask", mask_E(experts, excluded, -np.inf)), label="masked")
    if silent:
        kept = emitter.array("kept", 1 - mask_E(experts, silent, 1.0))
        gates = emitter.emit("Mul", gates, kept, label="silent_gates")
    if counted_for:
        counts = np.asarray(counted_for)[:, None] == np.arange(experts)
        gates = emitter.emit("MatMul", gates, emitter.array("counted_for", counts.astype(np.float32)), label="shared")
    return _output(graph, emitter, gates, "gates"), _output(graph, emitter, scores, "scores")


def routing_of(emitter: Emitter, block: MoEBlock, excluded: Sequence[int] = ()) -> Routing:
    """What the router of ``block`` hands over in the graph as it stands, whose logits exclude ``excluded`` already.

    Where the graph has it as a whole nowhere (a fused op routes by itself; a dispatch spreads it over the places of
    the experts), the router is computed once more from its logits.
    """
    router, rows = block.router, emitter.within("rows")
    ranked = _every_column(rows, router.ranked, router, "ranked")
    if router.gates is not None:
        return Routing(ranked, gates_TE=rows.reshape(router.gates, (-1, block.num_experts), "gates"))
    if router.slots is not None and router.capacity is None:
        slots = (router.slots.ids, router.slots.weights)  # batched_mm hands its weights over as (T K, 1)
        ids, weights = (rows.reshape(values, (-1, router.top_k), "slots") for values in slots)
        return Routing(ranked, ids_TK=ids, weights_TK=weights)
    logits = _every_column(rows, router.logits, router, "logits")
    logits = rows.emit("Cast", logits, label="logits_float", to=FLOAT)
    return routing_on(rows, _excluding(router, excluded), logits)


def _every_column(emitter: Emitter, tensor: gs.Tensor, router: Router, label: str) -> gs.Tensor:
    """(T, E): ``tensor``, and -inf for the experts that the graph's router has no column for."""
    missing = router.unranked
    columns = emitter.reshape(tensor, (-1, router.weight_EH.shape[0] - missing), label)
    if not missing:
        return columns
    numbers = emitter.emit("Cast", columns, label=f"{label}_float", to=FLOAT)
    out_of_reach = emitter.array("out_of_reach", np.float32(-np.inf))
    wide: gs.Tensor = emitter.emit("Pad", numbers, emitter.ints(0, 0, 0, missing), out_of_reach, label=f"{label}_wide")
    return wide


def _excluding(router: Router, excluded: Sequence[int]) -> Router:
    """``router`` without ``excluded``, where a score of 0 does not exclude them: what is added to it could."""
    experts = router.weight_EH.shape[0]
    top_k, bias = min(router.top_k, experts - len(excluded)), router.selection_bias_E
    if not excluded or (bias is None and router.groups is None):
        return dataclasses.replace(router, top_k=top_k)
    added = np.zeros(experts, np.float32) if bias is None else bias.load().astype(np.float32)
    masked = from_array(added + mask_E(experts, excluded, UNSELECTABLE))
    return dataclasses.replace(router, top_k=top_k, selection_bias_E=masked)


def mask_E(experts: int, excluded: Sequence[int], value: float) -> Mask:
    """(E,) float32: ``value`` for the experts in ``excluded``, 0 for the others.

    >>> mask_E(3, [1], -np.inf)
    array([  0., -inf,   0.], dtype=float32)
    """
    mask = np.zeros(experts, np.float32)
    mask[list(excluded)] = value
    return mask


def _in_float32(emitter: Emitter, routing: Routing) -> Routing:
    if routing.gates_TE is not None:
        gates = emitter.emit("Cast", routing.gates_TE, label="gates_float", to=FLOAT)
        return dataclasses.replace(routing, gates_TE=gates)
    weights = emitter.emit("Cast", routing.weights_TK, label="weights", to=FLOAT)
    return dataclasses.replace(routing, weights_TK=weights)


def _output(graph: gs.Graph, emitter: Emitter, tensor: gs.Tensor, label: str) -> str:
    result: gs.Variable = emitter.emit("Identity", tensor, label=f"{label}_out")
    result.dtype, result.shape = np.dtype(np.float32), [None, None]
    graph.outputs.append(result)
    return str(result.name)
