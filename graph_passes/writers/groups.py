"""Emit group-limited routing, whose groups may hold different numbers of experts after pruning."""

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import BOOL, INT64, Emitter
from graph_passes.record.block import Router

UNSELECTABLE = -1e30
"""Finite, so that a group of which one expert is left still ranks above a group of which none is."""


def exclude_groups(emitter: Emitter, router: Router, choice: gs.Tensor) -> gs.Tensor:
    """``choice`` (T, E) with -inf where an expert's group was not selected."""
    assert router.groups is not None
    scores = _group_scores(emitter, router, choice)
    _, selected = emitter.emit(
        "TopK", scores, emitter.ints(router.groups.selected), label="selected_groups", outputs=2, axis=-1
    )
    column = emitter.emit("Unsqueeze", selected, emitter.ints(2), label="selected_column")
    own = emitter.array("group_of", np.asarray(router.group_of))
    hit = emitter.emit("Equal", column, own, label="group_hit")
    hits = emitter.emit("Cast", hit, label="group_hit_number", to=INT64)
    selectable = emitter.emit("ReduceSum", hits, emitter.ints(1), label="group_selectable", keepdims=0)
    allowed = emitter.emit("Cast", selectable, label="allowed", to=BOOL)
    return emitter.emit("Where", allowed, choice, emitter.array("excluded", np.float32(-np.inf)), label="ranked")


def _group_scores(emitter: Emitter, router: Router, choice: gs.Tensor) -> gs.Tensor:
    """(T, groups): the sum of the best experts of each; what is missing to their number is unselectable."""
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
    number = emitter.ints(router.groups.scored_by)
    best, _ = emitter.emit("TopK", grouped, number, label="best_of_group", outputs=2, axis=-1)
    return emitter.emit("ReduceSum", best, emitter.ints(-1), label="group_scores", keepdims=0)
