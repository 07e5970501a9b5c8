"""Our experts function for transformers' experts interface: one ONNX node a layer, nothing of the experts traced.

https://huggingface.co/docs/transformers/experts_interface. Every class behind ``@use_experts_implementation`` hands its
hidden states, ids and weights to the registered function, whatever the family, so each exports to the same form.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from moe_spec.errors import UserError
from moe_spec.experts_op import DOMAIN, NO_LIMIT, VERSION, Activation, ExpertsOp

IMPLEMENTATION = "moe_edge"

ACTIVATIONS: Mapping[str, str] = {
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
}
"""Classes of transformers' ACT2FN, or functions, and the activation that each is."""


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


def describe(experts: torch.nn.Module) -> ExpertsOp:
    """The node variant that computes what ``experts`` computes.

    Raises:
        UserError: an activation, a gate or a norm that the node cannot express.
    """
    if experts.has_post_expert_norm:
        raise _inexpressible(experts, "a norm after each expert")
    return ExpertsOp(
        activation=_activation(experts),
        gated=bool(experts.has_gate),
        interleaved=bool(experts.has_gate and not experts.is_concatenated),
        transposed=bool(experts.is_transposed),
        biased=bool(experts.has_bias),
        gates_input=getattr(experts, "gates_input", False),
    )


def _activation(experts: torch.nn.Module) -> Activation:
    gate = Gate()
    if getattr(type(experts), "_apply_gate", None) is not _default_apply_gate:
        if type(experts).__name__ not in GATES:
            raise _inexpressible(experts, "a gate of its own")
        gate = GATES[type(experts).__name__]
    act = getattr(experts, "act_fn", functional.silu)
    name = getattr(act, "__name__", type(act).__name__)
    if name not in ACTIVATIONS:
        raise _inexpressible(experts, f"activation {name}")
    return Activation(
        ACTIVATIONS[name],
        alpha=getattr(experts, gate.alpha) if gate.alpha else 1.0,
        limit=getattr(experts, gate.limit) if gate.limit else NO_LIMIT,
        up_offset=gate.up_offset,
    )


def _inexpressible(experts: torch.nn.Module, what: str) -> UserError:
    return UserError(
        f"{type(experts).__name__} has {what}, which the exported experts node cannot express",
        hint="export the model with transformers' batched_mm experts and prune the ONNX file with `moe-edge optimize`",
    )


def _experts_node(
    experts: torch.nn.Module, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    op = describe(experts)
    up = "gate_up_proj" if op.gated else "up_proj"
    names = [up, "down_proj", *([f"{up}_bias", "down_proj_bias"] if op.biased else [])]
    inputs = (hidden_TH, ids_TK, weights_TK, *(getattr(experts, name) for name in names))
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{op.op_type}",
        inputs,
        op.to_attributes(),
        dtype=hidden_TH.dtype,
        shape=hidden_TH.shape,
        version=VERSION,
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_node)


@contextlib.contextmanager
def experts_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """``model`` with experts implementation ``name``, and as it was afterwards."""
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
