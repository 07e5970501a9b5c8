"""The oracle's reference where experts are replaced: the *original* graph, their gates at 0, plus ``gate_e mean_e``.

Gates are those of the original graph, or the weights beside its ids; the router is computed once more where it has
neither. Slots look up the mean outputs by their ids: no node of what a writer writes for them.
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.graph.walk import replace_uses
from graph_passes.proof.silence import silence_block
from graph_passes.record.block import MoEBlock
from graph_passes.record.prune import constants_for
from graph_passes.variants.observe import routing_of
from graph_passes.writers.routing import gates_of, slots_of
from moe_spec.layer_plan import LayerPlan


def replace_block(graph: gs.Graph, emitter: Emitter, block: MoEBlock, plan: LayerPlan) -> MoEBlock:
    """Replace the experts of ``block`` that ``plan`` drops by their mean outputs, in place.

    Gives the block with the values that it has now; its ``out`` is the sum that ``graph`` goes on with.

    Raises:
        UserError: the plan's mean outputs are not at hand or of another width, or have no gates.
    """
    constants_for(block, plan)  # refused for the same reasons
    if not plan.dropped:
        return block
    silent = silence_block(emitter, block, plan.dropped)
    emitter = emitter.within("replaced")
    term = emitter.emit("CastLike", _term(emitter, block, plan), block.out, label="term_typed")
    shape = emitter.emit("Shape", block.out, label="out_shape")
    out = emitter.emit("Add", block.out, emitter.emit("Reshape", term, shape, label="term_shaped"), label="out")
    replace_uses(graph, block.out, out, except_by=[tensor.inputs[0] for tensor in (term, shape, out)])
    return dataclasses.replace(silent, out=out)


def _term(emitter: Emitter, block: MoEBlock, plan: LayerPlan) -> gs.Tensor:
    """(T, H): the mean outputs of the dropped experts, each times its gate in the graph as it was."""
    experts, hidden = block.num_experts, block.experts.down_EFH.shape[2]
    means = np.zeros((experts + 1, hidden), np.float32)  # an id beyond the last expert leads to none
    means[list(plan.dropped)] = plan.mean_outputs(hidden)
    routing = routing_of(emitter, block)
    if routing.gates_TE is not None:
        gates = gates_of(emitter, routing, block)
        table = emitter.array("means", means[:experts])
        return emitter.emit("MatMul", emitter.emit("CastLike", gates, table, label="gates_typed"), table, label="term")
    ids, weights = slots_of(emitter, routing, block, nobody=experts)
    given = emitter.emit("Gather", emitter.array("means", means), ids, label="means_of_slots", axis=0)
    column = emitter.emit("Unsqueeze", weights, emitter.ints(2), label="weights_column")
    gated = emitter.emit("Mul", given, emitter.emit("CastLike", column, given, label="weights_typed"), label="gated")
    return emitter.emit("ReduceSum", gated, emitter.ints(1), label="term", keepdims=0)
