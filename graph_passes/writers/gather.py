"""Form ``gather``: each token's K experts gathered by id. Right for one token; a copy of K experts for every other."""

import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import ON_INPUT, ON_OUTPUT, MoEBlock
from graph_passes.weights.weight import Weight
from graph_passes.writers.expert_math import activate, gate_dtype
from graph_passes.writers.routing import Routing, emit_routing, slots_of


def write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, Routing]:
    """Nodes that compute ``block.out``, and the routing they use."""
    experts = block.experts
    routing = emit_routing(emitter, block)
    ids, weights = slots_of(emitter, routing, block)

    def project(x: gs.Tensor, weight: Weight, bias: Weight | None, label: str) -> gs.Tensor:
        """``x (T, K or 1, 1, in)`` times the gathered ``(T, K, in, out)``."""
        table = emitter.weight(f"experts.{label}", weight)
        kernel = emitter.emit("Gather", table, ids, label=f"{label}_weight", axis=0)
        product = emitter.emit("MatMul", x, kernel, label=label)
        if bias is None:
            return product
        rows = emitter.emit("Gather", emitter.weight(f"experts.{label}_bias", bias), ids, label=f"{label}_bias", axis=0)
        row = emitter.emit("Unsqueeze", rows, emitter.ints(2), label=f"{label}_bias_row")
        return emitter.emit("Add", product, row, label=f"{label}_biased")

    column = gate_dtype(
        emitter, emitter.emit("Unsqueeze", weights, emitter.ints(2, 3), label="weights_column"), experts
    )
    x = emitter.emit("Unsqueeze", block.hidden, emitter.ints(1, 2), label="token")
    if block.weights_on == ON_INPUT:
        x = emitter.emit("Mul", x, column, label="gated_token")
    gate = None if experts.gate_EHF is None else project(x, experts.gate_EHF, experts.gate_bias_EF, "gate")
    up = project(x, experts.up_EHF, experts.up_bias_EF, "up")
    outputs = project(activate(emitter, gate, up, experts), experts.down_EFH, experts.down_bias_EH, "down")
    if block.weights_on == ON_OUTPUT:
        outputs = emitter.emit("Mul", outputs, column, label="gated")
    return emitter.emit("ReduceSum", outputs, emitter.ints(1, 2), label="out", keepdims=0), routing
