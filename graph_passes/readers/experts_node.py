"""Reader for our own exporter's form: one ``moe_edge.Experts*`` node, taken at its word."""

import onnx_graphsurgeon as gs

from graph_passes.readers.parts.layout import check_stacked, from_stacked, scope_in
from graph_passes.record.block import ON_INPUT, ON_OUTPUT, FormError, MoEBlock
from graph_passes.routers import Weights, read_slots
from moe_spec.experts_op import DOMAIN, ExpertsOp

FORM = "experts"
LOOKS_FOR = "moe_edge.Experts node"


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The nodes that stand for the experts of one layer."""
    return [node for node in graph.nodes if node.domain == DOMAIN]


def read(node: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block around ``node``.

    Raises:
        FormError: the router in front is not a known one.
    """
    op = ExpertsOp.from_attributes(node.attrs, node.name)
    if len(node.inputs) != (7 if op.biased else 5):
        raise FormError(f"the node has {len(node.inputs)} inputs, expected {7 if op.biased else 5}", node)
    hidden, ids, gates = node.inputs[:3]
    up, down, *biases = (weights.of(tensor) for tensor in node.inputs[3:])
    up_bias, down_bias = biases or (None, None)
    check_stacked(node, up, down, up_bias, down_bias, op)
    experts = from_stacked(up, down, up_bias, down_bias, op)
    router = read_slots(ids, gates, weights)
    return MoEBlock(
        name=scope_in(node.inputs[3].name) or name,
        form=FORM,
        hidden=hidden,
        out=node.outputs[0],
        router=router,
        experts=experts,
        keep=tuple(range(router.weight_EH.shape[0])),
        weights_on=ON_INPUT if op.gates_input else ON_OUTPUT,
    )
