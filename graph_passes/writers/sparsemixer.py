"""Emit the sparsemixer (https://arxiv.org/abs/2409.12136): K rounds, each a softmax over the rivals of the best.

The chain is the one that transformers' Phi-3.5-MoE exports, and that `graph_passes.routers.sparsemixer` reads.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import Router


def sparsemixer(emitter: Emitter, router: Router, logits: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """(values (T, K), ids (T, K)) of the choice among ``logits`` (T, E)."""
    nothing = emitter.array("nothing", np.float32(-np.inf))
    magnitude = emitter.emit("Abs", logits, label="magnitude")
    left, ids, values = logits, [], []
    for index in range(router.top_k):
        chosen = emitter.emit("ArgMax", left, label=f"round_{index}_id", axis=-1, keepdims=1)
        rivals = _rivals(emitter.within(f"round_{index}"), router, left, logits, magnitude, nothing)
        scores = emitter.emit("Softmax", rivals, label=f"round_{index}_scores", axis=-1)
        values.append(emitter.emit("GatherElements", scores, chosen, label=f"round_{index}_value", axis=1))
        ids.append(chosen)
        if index + 1 < router.top_k:
            shape = emitter.emit("Shape", chosen, label=f"round_{index}_shape")
            taken = emitter.emit("Expand", nothing, shape, label=f"round_{index}_taken")
            left = emitter.emit("ScatterElements", left, chosen, taken, label=f"round_{index}_left", axis=1)
    if router.top_k == 1:
        return values[0], ids[0]
    return (
        emitter.emit("Concat", *values, label="selected", axis=-1),
        emitter.emit("Concat", *ids, label="ids", axis=-1),
    )


def _rivals(
    emitter: Emitter, router: Router, left: gs.Tensor, logits: gs.Tensor, magnitude: gs.Tensor, nothing: gs.Tensor
) -> gs.Tensor:
    """What is ``left`` with -inf where it is further below the best than 2 ``jitter_eps``, relatively."""
    best = _largest(emitter, left)
    distance = emitter.emit("Sub", best, logits, label="distance")
    factor = emitter.emit("Max", magnitude, best, label="factor")
    relative = emitter.emit("Div", distance, factor, label="relative")
    far = emitter.emit("Greater", relative, emitter.array("far", np.float32(2 * router.jitter_eps)), label="is_far")
    return emitter.emit("Where", far, nothing, left, label="rivals")


def _largest(emitter: Emitter, values: gs.Tensor) -> gs.Tensor:
    """(T, 1); the axis moved from an attribute to an input in opset 18."""
    if emitter.opset < 18:
        return emitter.emit("ReduceMax", values, label="best", axes=[-1], keepdims=1)
    return emitter.emit("ReduceMax", values, emitter.ints(-1), label="best", keepdims=1)
