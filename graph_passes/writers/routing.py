"""Emit the router of a block: from the hidden state to gates, or to ids and weights.

Where as many experts are left as are selected, nothing has to be ranked: the gates are the scores, without a TopK.
Router arithmetic is float32, whatever the rest of the graph is.
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.block import TOPK_FIRST, MoEBlock, Router
from graph_passes.emitter import BOOL, FLOAT, INT64, Emitter
from graph_passes.weights import Weight

UNSELECTABLE = -1e30
"""Finite, so that a group of which one expert is left still ranks above a group of which none is."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router hands over: ``gates_TE``, or ``ids_TK`` and ``weights_TK``; and ``ranked_TE``, what top-k ranks."""

    ranked_TE: gs.Tensor
    gates_TE: gs.Tensor | None = None
    ids_TK: gs.Tensor | None = None
    weights_TK: gs.Tensor | None = None


def emit_routing(emitter: Emitter, block: MoEBlock) -> Routing:
    """Nodes for the router of ``block``."""
    router = block.router
    logits = _linear(emitter, router)
    if router.order == TOPK_FIRST:
        return _topk_first(emitter, router, logits)
    scores = emitter.emit(router.score.capitalize(), logits, label="scores", **_axis(router.score))
    choice = scores
    if router.selection_bias_E is not None:
        choice = emitter.emit("Add", scores, emitter.weight("selection_bias", router.selection_bias_E), label="choice")
    if router.top_k == router.weight_EH.shape[0]:
        return Routing(choice, gates_TE=_finish(emitter, router, scores))
    ranked = choice if router.groups is None else _exclude_groups(emitter, router, choice)
    values, ids = _topk(emitter, ranked, router.top_k, "top_k")
    if ranked is not scores:
        values = emitter.emit("GatherElements", scores, ids, label="selected", axis=1)
    return Routing(ranked, ids_TK=ids, weights_TK=_finish(emitter, router, values))


def gates_of(emitter: Emitter, routing: Routing, experts: int) -> gs.Tensor:
    """Gates (T, E) float32: the weight where an expert is selected, 0 where not."""
    if routing.gates_TE is not None:
        return routing.gates_TE
    column = emitter.emit("Unsqueeze", routing.ids_TK, emitter.ints(2), label="ids_column")
    hit = emitter.emit("Equal", column, emitter.array("expert_ids", np.arange(experts)), label="hit")
    weights = emitter.emit("Unsqueeze", routing.weights_TK, emitter.ints(2), label="weights_column")
    spread = emitter.emit("Where", hit, weights, emitter.array("zero", np.float32(0)), label="spread")
    return emitter.emit("ReduceSum", spread, emitter.ints(1), label="gates", keepdims=0)


def slots_of(emitter: Emitter, routing: Routing, experts: int) -> tuple[gs.Tensor, gs.Tensor]:
    """Ids (T, K) int64 and weights (T, K) float32; all experts in order where nothing was ranked."""
    if routing.gates_TE is None:
        return routing.ids_TK, routing.weights_TK
    shape = emitter.emit("Shape", routing.gates_TE, label="gates_shape")
    ids = emitter.emit("Expand", emitter.array("expert_ids", np.arange(experts)[None]), shape, label="ids")
    return ids, routing.gates_TE


def _linear(emitter: Emitter, router: Router) -> gs.Tensor:
    experts, hidden = router.weight_EH.shape
    kernel = _float32(router.weight_EH).map((hidden, experts), lambda rows: np.ascontiguousarray(rows.T))
    x = emitter.emit("Cast", router.hidden, label="hidden_float", to=FLOAT) if _is_half(router) else router.hidden
    logits = emitter.emit("MatMul", x, emitter.weight("router.weight", kernel), label="logits")
    if router.bias_E is None:
        return logits
    return emitter.emit("Add", logits, emitter.weight("router.bias", _float32(router.bias_E)), label="biased_logits")


def _is_half(router: Router) -> bool:
    return router.weight_EH.dtype != np.float32


def _float32(weight: Weight) -> Weight:
    return weight.astype(np.float32)


def _axis(score: str) -> dict[str, int]:
    return {"axis": -1} if score == "softmax" else {}


def _topk(emitter: Emitter, ranked: gs.Tensor, count: int, label: str) -> tuple[gs.Tensor, gs.Tensor]:
    values, ids = emitter.emit("TopK", ranked, emitter.ints(count), label=label, outputs=2, axis=-1)
    return values, ids


def _topk_first(emitter: Emitter, router: Router, logits: gs.Tensor) -> Routing:
    if router.top_k == router.weight_EH.shape[0]:
        scores = emitter.emit(router.score.capitalize(), logits, label="scores", **_axis(router.score))
        return Routing(logits, gates_TE=_scale(emitter, router, scores))
    values, ids = _topk(emitter, logits, router.top_k, "top_k")
    scores = emitter.emit(router.score.capitalize(), values, label="scores", **_axis(router.score))
    return Routing(logits, ids_TK=ids, weights_TK=_scale(emitter, router, scores))


def _finish(emitter: Emitter, router: Router, scores: gs.Tensor) -> gs.Tensor:
    """Renormalise and scale; a softmax over all that is left sums to 1 already."""
    sums_to_one = router.score == "softmax" and router.top_k == router.weight_EH.shape[0]
    if router.renormalize and not sums_to_one:
        total = emitter.emit("ReduceSum", scores, emitter.ints(-1), label="total", keepdims=1)
        if router.eps:
            total = emitter.emit("Add", total, emitter.array("eps", np.float32(router.eps)), label="total_eps")
        scores = emitter.emit("Div", scores, total, label="renormalized")
    return _scale(emitter, router, scores)


def _scale(emitter: Emitter, router: Router, scores: gs.Tensor) -> gs.Tensor:
    if router.scale == 1.0:
        return scores
    return emitter.emit("Mul", scores, emitter.array("scale", np.float32(router.scale)), label="scaled")


def _exclude_groups(emitter: Emitter, router: Router, choice: gs.Tensor) -> gs.Tensor:
    """``choice`` with -inf where an expert's group was not selected; groups may hold different numbers of experts."""
    assert router.groups is not None
    count, experts = router.groups.count, len(router.group_of)
    members = [[expert for expert in range(experts) if router.group_of[expert] == group] for group in range(count)]
    width = max(router.groups.scored_by, *(len(group) for group in members))
    missing = experts  # the column of fillers that is appended to choice
    table = [group + [missing] * (width - len(group)) for group in members]
    first = emitter.emit("Slice", choice, *(emitter.ints(number) for number in (0, 1, 1)), label="first_column")
    nothing = emitter.emit("Mul", first, emitter.array("zero", np.float32(0)), label="zero_column")
    filler = emitter.emit("Add", nothing, emitter.array("unselectable", np.float32(UNSELECTABLE)), label="filler")
    padded = emitter.emit("Concat", choice, filler, label="padded", axis=1)
    flat = emitter.emit(
        "Gather", padded, emitter.array("members", np.asarray(table).reshape(-1)), label="grouped", axis=1
    )
    grouped = emitter.reshape(flat, (-1, count, width), "groups")
    best, _ = _topk(emitter, grouped, router.groups.scored_by, "best_of_group")
    group_scores = emitter.emit("ReduceSum", best, emitter.ints(-1), label="group_scores", keepdims=0)
    _, selected = _topk(emitter, group_scores, router.groups.selected, "selected_groups")
    column = emitter.emit("Unsqueeze", selected, emitter.ints(2), label="selected_column")
    own = emitter.array("group_of", np.asarray(router.group_of))
    hit = emitter.emit("Equal", column, own, label="group_hit")
    hits = emitter.emit("Cast", hit, label="group_hit_number", to=INT64)
    selectable = emitter.emit("ReduceSum", hits, emitter.ints(1), label="group_selectable", keepdims=0)
    allowed = emitter.emit("Cast", selectable, label="allowed", to=BOOL)
    return emitter.emit("Where", allowed, choice, emitter.array("excluded", np.float32(-np.inf)), label="ranked")
