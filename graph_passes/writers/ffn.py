"""Form ``ffn``: one expert is left and its gate is 1, so the layer is a plain dense FFN without router or TopK."""

import onnx_graphsurgeon as gs

from graph_passes.block import MoEBlock, Router
from graph_passes.emitter import Emitter
from graph_passes.weights import Weight
from graph_passes.writers.expert_math import activate, linear
from graph_passes.writers.routing import Routing

NEGLIGIBLE_EPS = 1e-12


def why_not(block: MoEBlock) -> str | None:
    """Why this form cannot express ``block``; None where it can."""
    if block.num_experts != 1:
        return f"it has {block.num_experts} experts, a plain FFN is one"
    if not gate_is_one(block.router):
        return f"the gate of a {block.router.kind} router with one expert is not 1"
    return None


def gate_is_one(router: Router) -> bool:
    """Whether the one selected expert's weight is 1 (times ``scale``) for every input.

    A softmax over one logit is 1. A renormalised sigmoid is s / (s + eps), which is 1 as long as eps is negligible
    beside s. A sigmoid that is not renormalised stays what it is.
    """
    return router.score == "softmax" or (router.renormalize and router.eps <= NEGLIGIBLE_EPS)


def write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, Routing | None]:
    """Nodes that compute ``block.out``; no routing is left. The router's scale is folded into the down projection."""
    experts, scale = block.experts, block.router.scale

    def project(x: gs.Tensor, weight: Weight, bias: Weight | None, label: str) -> gs.Tensor:
        added = None if bias is None else emitter.weight(f"experts.{label}_bias", _only(bias))
        return linear(emitter, x, emitter.weight(f"experts.{label}", _only(weight)), added, label)

    gate = None if experts.gate_EHF is None else project(block.hidden, experts.gate_EHF, experts.gate_bias_EF, "gate")
    up = project(block.hidden, experts.up_EHF, experts.up_bias_EF, "up")
    middle = activate(emitter, gate, up, experts)
    bias = None if experts.down_bias_EH is None else _scaled(experts.down_bias_EH, scale)
    return project(middle, _scaled(experts.down_EFH, scale), bias, "down"), None


def _only(weight: Weight) -> Weight:
    return weight.map(weight.shape[1:], lambda array: array[0])


def _scaled(weight: Weight, scale: float) -> Weight:
    if scale == 1.0:
        return weight
    return weight.map(weight.shape, lambda array: (array * array.dtype.type(scale)).astype(array.dtype))
