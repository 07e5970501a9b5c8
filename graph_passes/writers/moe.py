"""Form ``moe``: ``com.microsoft.MoE``, ONNX Runtime's fused op, which routes by itself.

It takes the logits of a softmax router. Of any other whose weights sum to 1 it takes the logarithm of the gates:
softmax(log g) = g / sum(g) = g, and log 0 = -inf selects nothing. A scale is folded into the down projection.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import MoEBlock
from graph_passes.writers.expert_math import gate_dtype
from graph_passes.writers.fused import (
    DOMAIN,
    attributes,
    first_bias,
    first_weight,
    fold_scale,
    is_divided,
    is_plain,
    optional,
    sums_exactly,
    trimmed,
    why_not_fused,
)
from graph_passes.writers.routing import Routing, emit_logits, emit_routing, gates_of


def why_not(block: MoEBlock) -> str | None:
    """Why this form cannot express ``block``; None where it can."""
    router, weights = block.router, block.experts.weights()
    if any(weight.scales is not None for weight in weights):
        return "its weights are quantised, which qmoe takes"
    dtype = block.experts.up_EHF.dtype
    if dtype not in (np.float32, np.float16):
        return f"ONNX Runtime's CPU kernel takes float32 and float16, this layer is {dtype.name}"
    if dtype == np.float16 and not is_divided(router):
        return "ONNX Runtime's CPU kernel gives zeros in float16 unless it renormalises"
    if not is_plain(router) and not (is_divided(router) and sums_exactly(router) and router.capacity is None):
        added = f"; it adds {router.eps:g} to their sum" if router.renormalize and not sums_exactly(router) else ""
        return f"the op's router is a softmax, and the gates of a {router.kind} router do not sum to 1{added}"
    return why_not_fused(block)


def write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, Routing]:
    """Nodes that compute ``block.out``, and the routing they use."""
    block = fold_scale(block)
    router, experts = block.router, block.experts
    if is_plain(router):
        logits = emit_logits(emitter, block)
        routing, normalize = Routing(logits, fused=router), is_divided(router)
    else:
        routing, normalize = emit_routing(emitter, block), True
        logits = emitter.emit("Log", gates_of(emitter, routing, block), label="log_gates")
    inputs = [
        block.hidden,
        gate_dtype(emitter, logits, experts),
        emitter.stored("experts.fc1", first_weight(experts)),
        optional(emitter, "experts.fc1_bias", first_bias(experts)),
        emitter.stored("experts.fc2", experts.down_EFH.swap()),
        optional(emitter, "experts.fc2_bias", experts.down_bias_EH),
    ]
    settings = {**attributes(block), "normalize_routing_weights": int(normalize)}
    return emitter.fused(DOMAIN, "MoE", *trimmed(inputs), label="out", **settings), routing
