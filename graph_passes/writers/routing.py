"""Emit the router of a block: from the hidden state to gates, or to ids and weights.

Where as many experts are left as are selected, nothing has to be ranked: the gates are the scores, without a TopK.
Router arithmetic is float32, whatever the rest of the graph is.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import FLOAT, Emitter
from graph_passes.graph.walk import SHAPE_ONLY, produced_by, source
from graph_passes.record.block import TOPK_FIRST, MoEBlock, Router
from graph_passes.weights.weight import Weight
from graph_passes.writers.capacity import within_capacity
from graph_passes.writers.groups import exclude_groups
from graph_passes.writers.sparsemixer import sparsemixer

NEGLIGIBLE_EPS = 1e-12
"""Beside a sum of 1, and beside every score that decides anything."""

RESHAPES = SHAPE_ONLY - {"Cast"}


@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router hands over: ``gates_TE``, or ``ids_TK`` and ``weights_TK``; and ``ranked_TE``, what top-k ranks.

    Or neither, where the op that reads ``ranked_TE`` makes of it what ``fused`` makes of its logits. Ids, and columns
    of gates, are rows of the router; where only those in ``leads_to`` lead to an expert, `gates_of` and `slots_of` make
    experts of them.
    """

    ranked_TE: gs.Tensor
    gates_TE: gs.Tensor | None = None
    ids_TK: gs.Tensor | None = None
    weights_TK: gs.Tensor | None = None
    fused: Router | None = None
    leads_to: tuple[int, ...] | None = None


def emit_routing(emitter: Emitter, block: MoEBlock) -> Routing:
    """Nodes for the router of ``block``, from what it reads."""
    return routing_on(emitter, block.router, emit_logits(emitter, block))


def routing_on(emitter: Emitter, router: Router, logits: gs.Tensor) -> Routing:
    """Nodes for ``router`` on ``logits`` (T, E) float32, biases and masks included."""
    if router.is_ranked:
        ranked, values, ids = _choose(emitter, router, logits)
        weights = _finish(emitter, router, values, ids)
        return Routing(ranked, ids_TK=ids, weights_TK=weights, leads_to=router.leads_to)
    scores = _score(emitter, router, logits)
    choice = logits if router.order == TOPK_FIRST else scores  # a selection bias decides nothing any more
    return Routing(choice, gates_TE=_finish(emitter, router, scores, None), leads_to=router.leads_to)


def columns_of(emitter: Emitter, values_TE: gs.Tensor, leads_to: Sequence[int], label: str) -> gs.Tensor:
    """Of values for all rows of a router those of the experts that some lead to."""
    rows = emitter.array("leads_to", np.asarray(leads_to, np.int64))
    return emitter.emit("Gather", values_TE, rows, label=label, axis=1)


def gates_of(emitter: Emitter, routing: Routing, block: MoEBlock) -> gs.Tensor:
    """Gates (T, E) float32 of the experts of ``block``: the weight where one is selected, 0 where not."""
    experts = block.num_experts if routing.leads_to is None else block.router.weight_EH.shape[0]
    gates = _spread(emitter, routing, range(experts)) if routing.gates_TE is None else routing.gates_TE
    if routing.leads_to is None:
        return gates
    if not block.router.aliases:
        return columns_of(emitter, gates, routing.leads_to, "gates_of_experts")
    leads = np.asarray(block.router.expert_of)[:, None] == np.arange(block.num_experts)
    return emitter.emit("MatMul", gates, emitter.array("leads", leads.astype(np.float32)), label="gates_of_experts")


def gates_of_rows(emitter: Emitter, routing: Routing, rows: Sequence[int]) -> gs.Tensor:
    """Gates (T, D) float32 of D rows of the router, whether they lead to an expert or not."""
    if routing.gates_TE is None:
        return _spread(emitter, routing, rows)
    return columns_of(emitter, routing.gates_TE, rows, "gates_of_rows")


def _spread(emitter: Emitter, routing: Routing, rows: Sequence[int]) -> gs.Tensor:
    """The weights of slots as gates (T, D) of ``rows``."""
    column = emitter.emit("Unsqueeze", routing.ids_TK, emitter.ints(2), label="ids_column")
    hit = emitter.emit("Equal", column, emitter.array("expert_ids", np.asarray(rows, np.int64)), label="hit")
    weights = emitter.emit("Unsqueeze", routing.weights_TK, emitter.ints(2), label="weights_column")
    spread = emitter.emit("Where", hit, weights, emitter.array("zero", np.float32(0)), label="spread")
    return emitter.emit("ReduceSum", spread, emitter.ints(1), label="gates", keepdims=0)


def slots_of(emitter: Emitter, routing: Routing, block: MoEBlock, nobody: int = 0) -> tuple[gs.Tensor, gs.Tensor]:
    """Ids (T, K) int64 and weights (T, K) float32; all experts of ``block`` in order where nothing was ranked.

    The choice of a row that leads to no expert has the id ``nobody`` and the weight 0.
    """
    if routing.gates_TE is None:
        if routing.leads_to is None:
            return routing.ids_TK, routing.weights_TK
        return _led(emitter, routing, block.router, nobody)
    gates = gates_of(emitter, routing, block)
    shape = emitter.emit("Shape", gates, label="gates_shape")
    every_id = emitter.array("expert_ids", np.arange(block.num_experts)[None])
    return emitter.emit("Expand", every_id, shape, label="ids"), gates


def _led(emitter: Emitter, routing: Routing, router: Router, nobody: int) -> tuple[gs.Tensor, gs.Tensor]:
    """Ids and weights of the experts that the chosen rows lead to; `graph_passes.routers.silence` reads them again."""
    led = np.asarray(router.expert_of, np.int64)
    expert_of, kept = np.where(led < 0, nobody, led), (led >= 0).astype(np.float32)
    ids = emitter.emit("Gather", emitter.array("expert_of", expert_of), routing.ids_TK, label="led_ids", axis=0)
    leads = emitter.emit("Gather", emitter.array("leads", kept), routing.ids_TK, label="led", axis=0)
    return ids, emitter.emit("Mul", routing.weights_TK, leads, label="led_weights")


def emit_logits(emitter: Emitter, block: MoEBlock) -> gs.Tensor:
    """(T, E) float32: the projection of what the router reads, biases and masks included."""
    router = block.router
    experts, hidden = router.weight_EH.shape
    kernel = _float32(router.weight_EH).map((hidden, experts), lambda rows: np.ascontiguousarray(rows.T))
    logits = emitter.emit("MatMul", _hidden(emitter, block), emitter.weight("router.weight", kernel), label="logits")
    if router.bias_E is None:
        return logits
    return emitter.emit("Add", logits, emitter.weight("router.bias", _float32(router.bias_E)), label="biased_logits")


def _hidden(emitter: Emitter, block: MoEBlock) -> gs.Tensor:
    """(T, H) float32 what the router reads: the experts' own input, where it is that but for its shape and type."""
    router = block.router
    read, shared = source(router.hidden, RESHAPES), source(block.hidden, RESHAPES)
    cast = produced_by(read, "Cast")
    if read is shared or (cast is not None and source(cast.inputs[0], RESHAPES) is shared):
        x = block.hidden
    else:
        x = emitter.reshape(router.hidden, (-1, router.weight_EH.shape[1]), "router_hidden")
    if cast is None and router.weight_EH.dtype == np.float32:
        return x
    return emitter.emit("Cast", x, label="hidden_float", to=FLOAT)


def _float32(weight: Weight) -> Weight:
    return weight.astype(np.float32)


def _score(emitter: Emitter, router: Router, logits: gs.Tensor) -> gs.Tensor:
    """Scores of all logits; the sparsemixer's only expert has no rival, so its score is a softmax's."""
    if router.score == "sigmoid":
        return emitter.emit("Sigmoid", logits, label="scores")
    if router.score == "sqrtsoftplus":
        return emitter.emit("Sqrt", emitter.emit("Softplus", logits, label="softplus"), label="scores")
    return emitter.emit("Softmax", logits, label="scores", axis=-1)


def _choose(emitter: Emitter, router: Router, logits: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """(what is ranked (T, E), scores (T, K) of the chosen, their ids (T, K))."""
    if router.score == "sparsemixer" and router.weight_EH.shape[0] > 1:
        return logits, *sparsemixer(emitter, router, logits)
    by_logit = router.order == TOPK_FIRST
    values = logits if by_logit else _score(emitter, router, logits)
    ranked = choice = values if router.selection_bias_E is None else _biased(emitter, router, values)
    if router.groups is not None:
        ranked = exclude_groups(emitter, router, choice)
    best, ids = _topk(emitter, ranked, router.top_k)
    if ranked is not values and not (by_logit and choice is values):
        best = emitter.emit("GatherElements", values, ids, label="selected", axis=1)
    return ranked, _score(emitter, router, best) if by_logit else best, ids


def _biased(emitter: Emitter, router: Router, values: gs.Tensor) -> gs.Tensor:
    assert router.selection_bias_E is not None
    bias = emitter.array("selection_bias", router.selection_bias_E.load())  # small, and a variant of a file may hold it
    return emitter.emit("Add", values, bias, label="choice")


def _topk(emitter: Emitter, ranked: gs.Tensor, count: int) -> tuple[gs.Tensor, gs.Tensor]:
    values, ids = emitter.emit("TopK", ranked, emitter.ints(count), label="top_k", outputs=2, axis=-1)
    return values, ids


def _finish(emitter: Emitter, router: Router, values: gs.Tensor, ids: gs.Tensor | None) -> gs.Tensor:
    """Renormalise, drop what finds no place, and scale."""
    capacity = router.capacity
    if capacity is None or ids is None:
        return _scale(emitter, router, _renormalize(emitter, router, values), ids)
    inside = within_capacity(emitter, capacity, ids, router.weight_EH.shape[0], router.top_k)
    if not capacity.before_renormalisation:
        values = _renormalize(emitter, router, values)
    values = emitter.emit("Mul", values, inside, label="kept")
    if capacity.before_renormalisation:
        values = _renormalize(emitter, router, values)
    return _scale(emitter, router, values, ids)


def _renormalize(emitter: Emitter, router: Router, scores: gs.Tensor) -> gs.Tensor:
    if not router.renormalize or sums_to_one(router):
        return scores
    total = emitter.emit("ReduceSum", scores, emitter.ints(-1), label="total", keepdims=1)
    if router.eps:
        eps = emitter.array("eps", np.float32(router.eps))
        total = emitter.emit("Max" if router.eps_clips else "Add", total, eps, label="total_eps")
    return emitter.emit("Div", scores, total, label="renormalized")


def sums_to_one(router: Router) -> bool:
    """Whether renormalising changes nothing: a softmax over all that is selected sums to 1 already."""
    whole = router.order == TOPK_FIRST or router.top_k == router.weight_EH.shape[0]
    dropped = router.capacity is not None and router.capacity.before_renormalisation
    negligible = router.eps <= (1.0 if router.eps_clips else NEGLIGIBLE_EPS)
    return router.score == "softmax" and whole and negligible and not dropped


def _scale(emitter: Emitter, router: Router, weights: gs.Tensor, ids: gs.Tensor | None) -> gs.Tensor:
    """What all weights are multiplied with, then each by what its expert has; all experts without ``ids``."""
    if router.scale != 1.0:
        weights = emitter.emit("Mul", weights, emitter.array("scale", np.float32(router.scale)), label="scaled")
    if router.scale_E is None:
        return weights
    scale_E = router.scale_E.load().astype(np.float32)
    if ids is None:
        return emitter.emit("Mul", weights, emitter.array("scale_row", scale_E[None]), label="scaled_each")
    own = emitter.emit("Gather", emitter.array("scale_of", scale_E), ids, label="own_scale", axis=0)
    return emitter.emit("Mul", weights, own, label="scaled_each")
