"""Reader for our own exporter's form: one ``moe_edge.Experts*`` node, taken at its word."""

import onnx_graphsurgeon as gs

from graph_passes.block import Experts, MoEBlock
from graph_passes.readers.layout import EXPERTS_SCOPE, from_stacked
from graph_passes.routers import Weights, read_router
from graph_passes.walk import operand
from moe_spec.experts_op import DOMAIN, ExpertsOp

FORM = "experts"


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The nodes that stand for the experts of one layer."""
    return [node for node in graph.nodes if node.domain == DOMAIN]


def read(node: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block around ``node``.

    Raises:
        FormError: the router in front is not a known one.
    """
    op = ExpertsOp.from_attributes(node.attrs, node.name)
    hidden, ids, gates, up, down = node.inputs[:5]
    experts: Experts = from_stacked(
        up=weights.of(up),
        down=weights.of(down),
        up_bias=None if (bias := operand(node, 5)) is None else weights.of(bias),
        down_bias=None if (bias := operand(node, 6)) is None else weights.of(bias),
        op=op,
    )
    router = read_router(ids, gates, weights)
    scope, found, _ = up.name.rpartition(EXPERTS_SCOPE)
    return MoEBlock(
        name=scope if found else name,
        form=FORM,
        hidden=hidden,
        out=node.outputs[0],
        router=router,
        experts=experts,
        keep=tuple(range(router.weight_EH.shape[0])),
    )
