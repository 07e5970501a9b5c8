"""Our exporter's node, which stands for all experts."""

from moe_spec.experts_op import DOMAIN
from tests.graph_passes.block_models import routers
from tests.graph_passes.block_models.block import Block


def emit(block: Block) -> str:
    b, op = block.b, block.spec.op
    routed = routers.slots(block)
    names = ["up", "down", *(["up_bias", "down_bias"] if op.biased else [])]
    weights = [b.weight(block.parameter(name), block.tensors[name]) for name in names]
    attributes = op.to_attributes() | {"name": b.fresh(f"{block.name}.experts")}
    return b.op(op.op_type, block.hidden, routed.ids, routed.weights, *weights, domain=DOMAIN, **attributes)
