"""Router tensors as extra outputs, in one shape whatever the form: for calibration and for parity."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.block import MoEBlock
from graph_passes.emitter import FLOAT, Emitter
from graph_passes.writers.routing import Routing, gates_of

OBSERVED = "observed"


def observe_routing(
    graph: gs.Graph, emitter: Emitter, routing: Routing, experts: int, excluded: Sequence[int] = ()
) -> tuple[str, str]:
    """Add two outputs for the block ``emitter`` writes; their names.

    ``<name>/observed/gates`` (T, E): the weight of each expert for each token, 0 where not selected.
    ``<name>/observed/scores`` (T, E): what top-k ranks, -inf for the experts in ``excluded``.
    """
    emitter = emitter.within(OBSERVED)
    gates = gates_of(emitter, _in_float32(emitter, routing), experts)
    scores = emitter.emit("Cast", routing.ranked_TE, label="ranked", to=FLOAT)
    if excluded:
        scores = emitter.emit("Add", scores, emitter.array("mask", mask_E(experts, excluded, -np.inf)), label="masked")
    return _output(graph, emitter, gates, "gates"), _output(graph, emitter, scores, "scores")


def routing_of(emitter: Emitter, block: MoEBlock) -> Routing | None:
    """What the router of ``block`` hands over in the graph as it stands; None where no value says so."""
    router = block.router
    if router.gates is not None:
        return Routing(router.ranked, gates_TE=router.gates)
    if router.slots is None:
        return None
    producer = router.slots.ids.inputs[0]
    ranked = producer.inputs[0] if producer.op == "TopK" else router.ranked  # a mask may stand in between by now
    slots = (router.slots.ids, router.slots.weights)
    rows = emitter.within("slots")  # batched_mm hands its weights over as (T K, 1)
    ids, weights = (rows.reshape(values, (-1, router.top_k), "rows") for values in slots)
    return Routing(ranked, ids_TK=ids, weights_TK=weights)


def mask_E(experts: int, excluded: Sequence[int], value: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """(E,) float32: ``value`` for the experts in ``excluded``, 0 for the others.

    >>> mask_E(3, [1], -np.inf)
    array([  0., -inf,   0.], dtype=float32)
    """
    mask = np.zeros(experts, np.float32)
    mask[list(excluded)] = value
    return mask


def _in_float32(emitter: Emitter, routing: Routing) -> Routing:
    if routing.weights_TK is None:
        return routing
    weights = emitter.emit("Cast", routing.weights_TK, label="weights", to=FLOAT)
    return Routing(routing.ranked_TE, ids_TK=routing.ids_TK, weights_TK=weights)


def _output(graph: gs.Graph, emitter: Emitter, tensor: gs.Tensor, label: str) -> str:
    result: gs.Variable = emitter.emit("Identity", tensor, label=f"{label}_out")
    result.dtype, result.shape = np.dtype(np.float32), [None, None]
    graph.outputs.append(result)
    return str(result.name)
