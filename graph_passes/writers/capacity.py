"""Emit which choices find a place, where an expert takes only so many tokens of a sequence.

``graph_passes.routers.places`` reads it again.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import FLOAT, INT64, Emitter
from graph_passes.graph.walk import scalar
from graph_passes.record.block import Capacity


def within_capacity(emitter: Emitter, capacity: Capacity, ids: gs.Tensor, experts: int, top_k: int) -> gs.Tensor:
    """(T, K) float32: 1 where the expert of ``ids`` (T, K) has a place for the token, 0 where it is full."""
    emitter = emitter.within("capacity")
    column = emitter.emit("Unsqueeze", ids, emitter.ints(2), label="ids_column")
    hit = emitter.emit("Equal", column, emitter.array("expert_ids", np.arange(experts)), label="hit")
    hits = emitter.emit("Cast", hit, label="hit_number", to=INT64)
    if capacity.by_slot and top_k > 1:
        counted = _count_slots_first(emitter, capacity, hits, experts, top_k)
    else:
        counted = _count_tokens_first(emitter, capacity, hits, experts)
    places = emitter.emit("Mul", counted, hits, label="places")
    place = emitter.emit("ReduceSum", places, emitter.ints(2), label="place", keepdims=0)
    inside = emitter.emit("LessOrEqual", place, _limit(emitter, capacity), label="inside")
    return emitter.emit("Cast", inside, label="inside_number", to=FLOAT)


def _limit(emitter: Emitter, capacity: Capacity) -> gs.Tensor:
    value = scalar(capacity.limit)
    if value is not None:
        return emitter.array("limit", np.int64(value))
    return emitter.emit("Cast", capacity.limit, label="limit", to=INT64)


def _count_tokens_first(emitter: Emitter, capacity: Capacity, hits: gs.Tensor, experts: int) -> gs.Tensor:
    """(T, 1, E) how many tokens of the sequence have chosen each expert so far."""
    chosen = emitter.emit("ReduceSum", hits, emitter.ints(1), label="chosen", keepdims=0)
    queue = _by_sequence(emitter, capacity, chosen, (experts,))
    running = emitter.emit("CumSum", queue, emitter.array("axis", np.int64(1)), label="running")
    return emitter.reshape(running, (-1, 1, experts), "running_flat")


def _count_slots_first(emitter: Emitter, capacity: Capacity, hits: gs.Tensor, experts: int, top_k: int) -> gs.Tensor:
    """(T, K, E) how many choices of the sequence each expert has had so far, first choices before second ones."""
    by_sequence = _by_sequence(emitter, capacity, hits, (top_k, experts))
    turned = emitter.emit("Transpose", by_sequence, label="slots_first", perm=[0, 2, 1, 3])
    queue = emitter.reshape(turned, (0, -1, experts), "queue")
    running = emitter.emit("CumSum", queue, emitter.array("axis", np.int64(1)), label="running")
    shape = emitter.emit("Shape", turned, label="slots_first_shape")
    parted = emitter.emit("Reshape", running, shape, label="running_by_slot")
    back = emitter.emit("Transpose", parted, label="running_by_token", perm=[0, 2, 1, 3])
    return emitter.reshape(back, (-1, top_k, experts), "running_flat")


def _by_sequence(emitter: Emitter, capacity: Capacity, hits: gs.Tensor, trailing: tuple[int, ...]) -> gs.Tensor:
    """``hits`` (T, ...) as (B, S, ...)."""
    if capacity.sequence is None:
        return emitter.reshape(hits, (1, -1, *trailing), "by_sequence")
    lengths = emitter.emit("Shape", capacity.sequence, label="sequence_lengths", start=0, end=2)
    shape = emitter.emit("Concat", lengths, emitter.ints(*trailing), label="sequence_shape", axis=0)
    return emitter.emit("Reshape", hits, shape, label="by_sequence")
