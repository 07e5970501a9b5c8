"""Reader for ``TRT_MoE``, the node that TensorRT's ONNX parser makes an ``IMoELayer`` of; a router stands in front.

Inputs: hidden (B, S, H), ids (B, S, K) int32, weights (B, S, K), gate (E, H, F), up (E, H, F), down (E, F, H), and
three biases, all or none. ``activation_type`` 1 is silu, 0 (what it is where it is left out) is none.
(https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/MoE.html)
"""

import onnx_graphsurgeon as gs

from graph_passes.readers.parts.contrib import integer, leading_axes
from graph_passes.readers.parts.projection import read_weight
from graph_passes.record.block import Experts, FormError, MoEBlock
from graph_passes.routers import Weights, read_slots
from moe_spec.experts_op import Activation

FORM = "trt_moe"
LOOKS_FOR = "TRT_MoE node"

DOMAIN = "trt"
SILU = 1
PLAIN, BIASED = 6, 9
"""Number of inputs."""


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The fused nodes, whatever domain the exporter gave them: the parser looks at the name."""
    return [node for node in graph.nodes if node.op == "TRT_MoE"]


def read(node: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block around ``node``.

    Raises:
        FormError: a router, an activation or a layout that is not known.
    """
    if len(node.inputs) not in (PLAIN, BIASED):
        raise FormError(f"the node has {len(node.inputs)} inputs, expected {PLAIN} or {BIASED}", node)
    kind = integer(node, "activation_type", 0)
    if kind != SILU:
        raise FormError(f"activation_type is {kind}, expected {SILU} (silu)", node)
    hidden, ids, gates = node.inputs[:3]
    gate, up, down, *biases = (read_weight(tensor, weights) for tensor in node.inputs[3:])
    gate_bias, up_bias, down_bias = biases or (None, None, None)
    experts = Experts(up, gate, down, up_bias, gate_bias, down_bias, Activation("silu"))
    _check_shapes(node, experts)
    router = read_slots(ids, gates, weights)
    return MoEBlock(
        name=router.scope or name,
        form=FORM,
        hidden=hidden,
        out=node.outputs[0],
        router=router,
        experts=experts,
        keep=tuple(range(router.weight_EH.shape[0])),
        shaped_like=leading_axes(hidden),
    )


def _check_shapes(node: gs.Node, experts: Experts) -> None:
    shapes = [list(weight.shape) for weight in experts.weights()]
    problem = FormError(f"the experts' weights have shapes {shapes}, which do not fit together", node)
    if len(experts.down_EFH.shape) != 3:
        raise problem
    count, width, hidden = experts.down_EFH.shape
    wanted = [(count, hidden, width)] * 2 + [(count, width, hidden), (count, width), (count, width), (count, hidden)]
    if [tuple(shape) for shape in shapes] != wanted[: len(shapes)]:
        raise problem
