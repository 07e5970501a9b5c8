"""Reader for ``com.microsoft.MoE``, which takes router logits and does softmax, top-k and the experts in one op.

Inputs: hidden (T, H) or (B, S, H), logits (T, E), fc1 (E, F or 2F, H) and bias, fc2 (E, H, F) and bias, fc3 and bias.
Models from before ONNX Runtime 1.22 have the weights as (E, in, out), which shows where F is not H.
What the kernel does: softmax over all E logits, the K best, divided by their sum where ``normalize_routing_weights``.
So a router of another kind is fed as the logarithm of its gates: softmax(log g) = g / sum(g). That is read back.
"""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, source
from graph_passes.readers.parts.contrib import (
    DOMAIN,
    Projections,
    check_logits,
    experts_of,
    integer,
    leading_axes,
    optional,
    sparse,
)
from graph_passes.record.block import FormError, MoEBlock, Router
from graph_passes.routers import Weights, read_gates, read_logits

FORM = "moe"
LOOKS_FOR = "com.microsoft.MoE node"


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The fused nodes."""
    return [node for node in graph.nodes if node.op == "MoE" and node.domain == DOMAIN]


def read(node: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block around ``node``.

    Raises:
        FormError: a router, an activation or a layout that is not known.
    """
    if len(node.inputs) < 5:
        raise FormError(f"the node has {len(node.inputs)} inputs, expected at least 5", node)
    router = read_fused_router(node, weights)
    fc1, fc2, fc3, *biases = (optional(node, index, weights) for index in (2, 4, 6, 3, 5, 7))
    if fc1 is None or fc2 is None or {len(part.shape) for part in (fc1, fc2, fc3) if part is not None} != {3}:
        raise FormError("fc1 or fc2 is left out, or has another rank than 3", node)
    if fc2.shape[1:2] != router.weight_EH.shape[1:2] == fc2.shape[2:]:
        fc1, fc2, fc3 = fc1.swap(), fc2.swap(), None if fc3 is None else fc3.swap()
    experts = experts_of(node, Projections(fc1, fc2, fc3, *biases))
    return MoEBlock(
        name=router.scope or name,
        form=FORM,
        hidden=node.inputs[0],
        out=node.outputs[0],
        router=router,
        experts=experts,
        keep=tuple(range(router.weight_EH.shape[0])),
        shaped_like=leading_axes(node.inputs[0]),
    )


def read_fused_router(node: gs.Node, weights: Weights) -> Router:
    """The router whose logits, or logarithms of gates, input 1 of ``node`` is.

    Raises:
        FormError: no known router.
    """
    top_k, renormalize = integer(node, "k", 1), bool(integer(node, "normalize_routing_weights", 0))
    logarithm = produced_by(source(node.inputs[1]), "Log")
    if logarithm is None:
        router = read_logits(node.inputs[1], top_k=top_k, renormalize=renormalize, weights_of=weights)
        check_logits(node, router)
        return sparse(node, router)
    gates = read_gates(logarithm.inputs[0], weights)
    ranks_all = gates.top_k == gates.weight_EH.shape[0] and gates.top_k != top_k
    if ranks_all and not renormalize:
        raise FormError("the logits are logarithms of scores, whose sum over all experts divides the weights", node)
    if not ranks_all and gates.top_k != top_k:
        raise FormError(f"k is {top_k}, but the gates are those of {gates.top_k} experts", node)
    return dataclasses.replace(gates, top_k=top_k, renormalize=True, eps=0.0, scale=1.0)
