"""Form ``ffn``: one expert is left and its gate is 1, so the layer is a plain dense FFN without router or TopK."""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import ON_INPUT, MoEBlock, Router
from graph_passes.writers.expert_math import scaled, single_ffn
from graph_passes.writers.routing import NEGLIGIBLE_EPS, Routing, sums_to_one


def why_not(block: MoEBlock) -> str | None:
    """Why this form cannot express ``block``; None where it can."""
    if block.num_experts != 1:
        return f"it has {block.num_experts} experts, a plain FFN is one"
    if block.router.capacity is not None:
        return "its expert drops tokens beyond its capacity"
    if not gate_is_one(block.router):
        return f"the gate of a {block.router.kind} router with one expert is not 1"
    if block.weights_on == ON_INPUT and (block.router.scale != 1.0 or block.router.scale_E is not None):
        return "its router scales what the expert reads"
    return None


def gate_is_one(router: Router) -> bool:
    """Whether the one selected expert's weight is 1 (times ``scale``) for every input.

    A softmax over one logit is 1, and so is a sparsemixer's. A renormalised sigmoid is s / (s + eps), which is 1 as
    long as eps is negligible beside s, and so with other scores. One that is not renormalised stays what it is.
    """
    if not router.renormalize:
        return router.score in ("softmax", "sparsemixer")
    return sums_to_one(router) or router.eps <= NEGLIGIBLE_EPS


def write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, Routing | None]:
    """Nodes that compute ``block.out``; no routing is left. The router's scales are folded into the down projection."""
    own = block.router.scale_E
    scale = block.router.scale * (1.0 if own is None else float(own.load()[0]))
    down_bias = block.experts.down_bias_EH
    experts = dataclasses.replace(
        block.experts,
        down_EFH=scaled(block.experts.down_EFH, scale),
        down_bias_EH=None if down_bias is None else scaled(down_bias, scale),
    )
    return single_ffn(emitter, block.hidden, experts, 0, "experts"), None
