"""Form ``dense``: every expert on every token as two or three 2-D GEMMs, the gate before the down projection.

``out = reshape(act(x @ W_up (H, E F)) * gates (T, E, 1)) @ W_down (E F, H)``. No data-dependent shape and no copy of a
weight per token, so TensorRT takes it and it costs E/K times the selected work: the form for few experts. Where gates
multiply the experts' input they multiply what the first projections give, which have no biases then.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import ON_OUTPUT, MoEBlock
from graph_passes.weights.weight import Weight
from graph_passes.writers.expert_math import activate, gate_dtype, linear
from graph_passes.writers.routing import Routing, emit_routing, gates_of


def write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, Routing]:
    """Nodes that compute ``block.out``, and the routing they use."""
    experts, count = block.experts, block.num_experts
    width = experts.up_EHF.shape[2]
    routing = emit_routing(emitter, block)
    gates = gate_dtype(emitter, gates_of(emitter, routing, block), experts)
    column = emitter.emit("Unsqueeze", gates, emitter.ints(2), label="gates_column")

    def project(weight: Weight, bias: Weight | None, label: str) -> gs.Tensor:
        wide = _wide(emitter, block.hidden, weight, bias, label)
        if block.weights_on == ON_OUTPUT:
            return wide
        by_expert = emitter.reshape(wide, (-1, count, width), f"{label}_TEF")
        return emitter.emit("Mul", by_expert, column, label=f"{label}_gated")

    gate = None if experts.gate_EHF is None else project(experts.gate_EHF, experts.gate_bias_EF, "gate")
    gated = activate(emitter, gate, project(experts.up_EHF, experts.up_bias_EF, "up"), experts)
    if block.weights_on == ON_OUTPUT:
        middle = emitter.reshape(gated, (-1, count, width), "middle_TEF")
        gated = emitter.emit("Mul", middle, column, label="gated")
    gated = emitter.reshape(gated, (-1, count * width), "gated_flat")
    down_EFH = experts.down_EFH
    out = linear(emitter, gated, down_EFH.joined(), None, "experts.down", "down")
    if experts.down_bias_EH is not None:  # each expert's bias counts as much as its gate
        bias = emitter.emit(
            "MatMul", gates, emitter.weight("experts.down_bias", experts.down_bias_EH), label="down_bias"
        )
        out = emitter.emit("Add", out, bias, label="out")
    return out, routing


def _wide(emitter: Emitter, x: gs.Tensor, weight: Weight, bias: Weight | None, label: str) -> gs.Tensor:
    """``x (T, H) @ (H, E F)``: the experts side by side."""
    experts, _, width = weight.shape
    flat = None if bias is None else bias.map((experts * width,), np.ravel, row_wise=True)
    return linear(emitter, x, weight.swap().joined().swap(), flat, f"experts.{label}", label)
