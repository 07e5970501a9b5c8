"""Our experts function for transformers' experts interface: one ONNX node a layer, nothing of the experts traced.

Where the node cannot say what experts compute, they are traced as 3-D products with the family's own code between.

https://huggingface.co/docs/transformers/experts_interface. Every class behind ``@use_experts_implementation`` hands its
hidden states, ids and weights to the registered function, whatever the family, so each exports to the same form.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from models.moe_layers import MoELayer
from moe_spec.experts_op import DOMAIN, NO_LIMIT, VERSION, Activation, ExpertsOp
from moe_spec.manifest import EXPERT_CHOICE

IMPLEMENTATION = "moe_edge"

NODE, STACKED = "experts", "stacked"
"""Forms of exported layers, as graph_passes calls them."""

ACTIVATIONS: Mapping[str, str] = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
"""Classes of transformers' ACT2FN, and the activation that each is."""

FUNCTIONS: Mapping[Any, str] = {
    functional.gelu: "gelu",
    functional.relu: "relu",
    functional.silu: "silu",
    torch.relu: "relu",
}
"""The same of functions; by themselves, because a name says nothing of what an approximation is."""


class Gate(NamedTuple):
    """How an experts class that has a gate of its own mixes: ``act(gate) * (up + offset)``, clamped.

    Attributes:
        alpha: attribute that holds ``Activation.alpha``, if there is one.
        limit: attribute that holds ``Activation.limit``, if there is one.
        up_offset: ``Activation.up_offset``.
    """

    alpha: str | None = None
    limit: str | None = None
    up_offset: float = 0.0


GATES: Mapping[str, Gate] = {
    "BeamExperts": Gate(),  # in float32, as all here
    "DeepseekV4Experts": Gate(limit="limit"),
    "Glm5NextTextExperts": Gate(limit="swiglu_limit"),
    "GptOssExperts": Gate("alpha", "limit", up_offset=1.0),
    "HYV4Experts": Gate(limit="swiglu_limit"),
    "MiniMaxM3VLExperts": Gate("swiglu_alpha", "swiglu_limit", up_offset=1.0),
    "OpenAIPrivacyFilterExperts": Gate("alpha", "limit", up_offset=1.0),
}
"""Experts classes with ``_apply_gate``; one without ``act_fn`` uses silu."""


def form_of(layer: MoELayer) -> str:
    """How a layer is exported: as one node, in plain ops where that cannot express its experts, or as they choose."""
    if layer.expert_choice:
        return EXPERT_CHOICE
    return STACKED if describe(layer.experts) is None else NODE


def describe(experts: torch.nn.Module) -> ExpertsOp | None:
    """The node variant that computes what ``experts`` computes; None: it has no such activation, gate or norm."""
    activation = _activation(experts)
    if activation is None or experts.has_post_expert_norm:
        return None
    return ExpertsOp(
        activation=activation,
        gated=bool(experts.has_gate),
        interleaved=bool(experts.has_gate and not experts.is_concatenated),
        transposed=bool(experts.is_transposed),
        biased=bool(experts.has_bias),
        gates_input=getattr(experts, "gates_input", False),
    )


def _activation(experts: torch.nn.Module) -> Activation | None:
    default = getattr(type(experts), "_apply_gate", None) is _default_apply_gate
    gate = Gate() if default else GATES.get(type(experts).__name__)
    kind = _kind(getattr(experts, "act_fn", functional.silu))
    if gate is None or kind is None:
        return None
    return Activation(
        kind,
        alpha=getattr(experts, gate.alpha) if gate.alpha else 1.0,
        limit=getattr(experts, gate.limit) if gate.limit else NO_LIMIT,
        up_offset=gate.up_offset,
    )


def _kind(act: Any) -> str | None:
    """What an activation is called in `ACTIVATIONS`, if it is one of them."""
    if type(act) is torch.nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return FUNCTIONS[act] if act in FUNCTIONS else ACTIVATIONS.get(type(act).__name__)


def _run(
    experts: torch.nn.Module, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """What transformers calls instead of its own loop over experts."""
    op = describe(experts)
    if op is None:
        return stacked(experts, hidden_TH, ids_TK, weights_TK)
    inputs = (hidden_TH, ids_TK, weights_TK, *(getattr(experts, name) for name in _names(op.gated, op.biased)))
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{op.op_type}",
        inputs,
        op.to_attributes(),
        dtype=hidden_TH.dtype,
        shape=hidden_TH.shape,
        version=VERSION,
    )


def stacked(
    experts: torch.nn.Module, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token, (T, H), times its gate: gate, activation and norm are the family's own code.

    No shape depends on data, and the graph does not grow with the experts; `graph_passes` may not know what they do.
    """
    parameters: Any = experts  # what transformers' decorator promises
    up, down, *biases = (getattr(parameters, name) for name in _names(parameters.has_gate, parameters.has_bias))
    up_bias, down_bias = (bias[:, None] for bias in biases) if biases else (0, 0)
    kernels = (up, down) if parameters.is_transposed else (up.mT, down.mT)
    hit_TKE = ids_TK[..., None] == torch.arange(len(up), device=ids_TK.device)
    gates_ET1 = (hit_TKE * weights_TK[..., None]).sum(dim=1).T[..., None]
    on_input = getattr(experts, "gates_input", False)
    middle_ETF = (hidden_TH * gates_ET1 if on_input else hidden_TH) @ kernels[0] + up_bias
    middle_ETF = parameters._apply_gate(middle_ETF) if parameters.has_gate else parameters.act_fn(middle_ETF)
    out_ETH = middle_ETF @ kernels[1] + down_bias
    if parameters.has_post_expert_norm:
        out_ETH = parameters.post_expert_norm(out_ETH)
    mixed_TH: torch.Tensor = (out_ETH if on_input else out_ETH * gates_ET1).sum(dim=0)
    return mixed_TH.to(hidden_TH.dtype)


def _names(gated: bool, biased: bool) -> list[str]:
    """Of the experts' parameters, in the order of the node's inputs."""
    up = "gate_up_proj" if gated else "up_proj"
    return [up, "down_proj", *([f"{up}_bias", "down_proj_bias"] if biased else [])]


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run)


@contextlib.contextmanager
def experts_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """``model`` with experts implementation ``name``, and as it was afterwards."""
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
