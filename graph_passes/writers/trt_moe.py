"""Form ``trt_moe``: TensorRT's ``IMoELayer`` as the ``TRT_MoE`` node that its ONNX parser takes; for SM100, 103, 110.

Ids and weights are computed outside. ONNX Runtime does not run it, and TensorRT lowers it on those devices only.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.readers.trt_moe import DOMAIN, SILU
from graph_passes.record.block import ON_OUTPUT, Experts, MoEBlock
from graph_passes.weights.weight import Weight, from_array
from graph_passes.writers.expert_math import gate_dtype
from graph_passes.writers.routing import Routing, emit_routing, slots_of
from moe_spec.experts_op import Activation


def why_not(block: MoEBlock) -> str | None:
    """Why this form cannot express ``block``; None where it can."""
    experts = block.experts
    if experts.gate_EHF is None or experts.activation != Activation("silu"):
        return "the op gates with plain silu alone"
    if block.weights_on != ON_OUTPUT:
        return "its weights multiply what the experts read"
    if any(weight.scales is not None for weight in experts.weights()):
        return "the op takes quantised weights in a layout of its own"
    return None


def write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, Routing]:
    """Nodes that compute ``block.out``, and the routing they use; all tokens stand in one sequence."""
    experts = block.experts
    routing = emit_routing(emitter, block)
    ids, weights = slots_of(emitter, routing, block)
    small = emitter.emit("Cast", ids, label="ids_int32", to=onnx.TensorProto.INT32)
    values = [block.hidden, small, gate_dtype(emitter, weights, experts)]
    labels = ("sequence", "sequence_ids", "sequence_weights")
    sequences = [
        emitter.emit("Unsqueeze", value, emitter.ints(0), label=label)
        for value, label in zip(values, labels, strict=True)
    ]
    assert experts.gate_EHF is not None
    kernels = {"gate": experts.gate_EHF, "up": experts.up_EHF, "down": experts.down_EFH}
    constants = [emitter.weight(f"experts.{name}", weight) for name, weight in (kernels | _biases(experts)).items()]
    out = emitter.fused(DOMAIN, "TRT_MoE", *sequences, *constants, label="out_sequence", activation_type=SILU)
    return emitter.emit("Squeeze", out, emitter.ints(0), label="out"), routing


def _biases(experts: Experts) -> dict[str, Weight]:
    """All three biases, zeros where only some are there; none where none is."""
    given = {"gate_bias": experts.gate_bias_EF, "up_bias": experts.up_bias_EF, "down_bias": experts.down_bias_EH}
    if all(bias is None for bias in given.values()):
        return {}
    count, width, hidden = experts.down_EFH.shape
    lengths = {"gate_bias": width, "up_bias": width, "down_bias": hidden}
    return {
        name: from_array(np.zeros((count, lengths[name]), experts.up_EHF.dtype)) if bias is None else bias
        for name, bias in given.items()
    }
