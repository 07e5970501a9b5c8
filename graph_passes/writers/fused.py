"""What the writers of ``com.microsoft.MoE`` and ``QMoE`` share: what the ops can express, and their common inputs.

Limits are those of ONNX Runtime 1.31's CPU kernels: gated experts are interleaved swiglu, others relu, silu or the tanh
gelu; weights multiply outputs; K is at most E.
"""

import dataclasses
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import ON_OUTPUT, TOPK_FIRST, Experts, MoEBlock, Router
from graph_passes.weights.weight import Weight, alternate, from_array
from graph_passes.writers.expert_math import scaled
from graph_passes.writers.routing import NEGLIGIBLE_EPS
from moe_spec.experts_op import NO_LIMIT, Activation

DOMAIN = "com.microsoft"
UNGATED = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu"}


def why_not_fused(block: MoEBlock) -> str | None:
    """Why neither op can express ``block``, whatever its router; None where one may."""
    activation, gated = block.experts.activation, block.experts.gate_EHF is not None
    if block.weights_on != ON_OUTPUT:
        return "its weights multiply what the experts read"
    if gated and activation.kind != "silu":
        return f"the op gates with silu, this layer with {activation.kind}"
    if not gated and (activation.kind not in UNGATED or activation != Activation(activation.kind)):
        return f"the op has no activation {activation.kind} without a gate"
    return None


def is_plain(router: Router) -> bool:
    """Whether softmax and top-k over the logits, as the ops make them, do what ``router`` does, up to its scale."""
    by_score = not router.is_ranked or (router.selection_bias_E is None and router.groups is None)
    limited = router.capacity is not None or router.scale_E is not None
    return router.score == "softmax" and by_score and not limited and sums_exactly(router)


def sums_exactly(router: Router) -> bool:
    """Whether nothing worth mentioning is added to the sum that renormalises."""
    best = router.score == "softmax" and router.selection_bias_E is None and router.groups is None
    least = router.top_k / router.weight_EH.shape[0] if best and router.eps_clips else 0.0
    return not router.renormalize or router.eps <= max(NEGLIGIBLE_EPS, least)


def is_divided(router: Router) -> bool:
    """Whether the weights of a token are shares of their sum: renormalised, or a softmax over what is selected."""
    selected = router.order == TOPK_FIRST or router.top_k == router.weight_EH.shape[0]
    return router.scale_E is None and (router.renormalize or (router.score == "softmax" and selected))


def attributes(block: MoEBlock) -> dict[str, Any]:
    """What both ops are told of the experts, and K."""
    activation = block.experts.activation
    common: dict[str, Any] = {"k": block.router.top_k}
    if block.experts.gate_EHF is None:
        return {**common, "activation_type": UNGATED[activation.kind]}
    limit = {} if activation.limit == NO_LIMIT else {"swiglu_limit": activation.limit}
    gating = {"activation_alpha": activation.alpha, "activation_beta": activation.up_offset, **limit}
    return {**common, "activation_type": "swiglu", "swiglu_fusion": 1, **gating}


def fold_scale(block: MoEBlock) -> MoEBlock:
    """``block`` with the router's scale in the down projection, because the ops have none."""
    scale, experts = block.router.scale, block.experts
    bias = experts.down_bias_EH
    down = scaled(experts.down_EFH, scale)
    return dataclasses.replace(
        block,
        router=dataclasses.replace(block.router, scale=1.0),
        experts=dataclasses.replace(experts, down_EFH=down, down_bias_EH=None if bias is None else scaled(bias, scale)),
    )


def first_weight(experts: Experts) -> Weight:
    """fc1: up (E, F, H), or gate and up (E, 2F, H) in turns."""
    up = experts.up_EHF.swap()
    return up if experts.gate_EHF is None else alternate(experts.gate_EHF.swap(), up)


def first_bias(experts: Experts) -> Weight | None:
    """The bias of fc1 (E, F or 2F); None where there is none."""
    gate, up = experts.gate_bias_EF, experts.up_bias_EF
    if experts.gate_EHF is None or (gate is None and up is None):
        return up
    nothing = from_array(np.zeros(experts.up_EHF.shape[::2], experts.up_EHF.float_dtype))
    return alternate(gate or nothing, up or nothing)


def optional(emitter: Emitter, label: str, weight: Weight | None) -> gs.Tensor:
    """A weight, or an input that is left out."""
    return gs.Variable.empty() if weight is None else emitter.stored(label, weight)


def trimmed(inputs: list[gs.Tensor]) -> list[gs.Tensor]:
    """``inputs`` without those left out at the end."""
    while inputs and inputs[-1].is_empty():
        inputs = inputs[:-1]
    return inputs
