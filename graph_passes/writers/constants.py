"""What stands in for experts that went: ``out + gates (T, D) @ outputs (D, H)``, whatever form the others have."""

import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import Constants, MoEBlock
from graph_passes.writers.expert_math import gate_dtype
from graph_passes.writers.routing import Routing, gates_of_rows


def add_constants(
    emitter: Emitter, block: MoEBlock, constants: Constants, routing: Routing, out: gs.Tensor
) -> gs.Tensor:
    """``out`` (T, H) of the experts of ``block`` that are left, and what the others are replaced by."""
    emitter = emitter.within("constants")
    gates = gate_dtype(emitter, gates_of_rows(emitter, routing, constants.rows), block.experts)
    term = emitter.emit("MatMul", gates, emitter.weight("outputs", constants.outputs_DH), label="term")
    return emitter.emit("Add", out, term, label="out")
