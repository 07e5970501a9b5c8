"""``moe_edge.Experts*``: the node that stands for all routed experts of one MoE layer in an exported graph.

The exporter writes it, with its definition in standard ops as a model-local function, so any ONNX runtime can run it.
graph_passes takes its attributes at their word instead of guessing from patterns. Inputs, in this order::

    hidden (T, H)   ids (T, K) int64   weights (T, K)   up   down   [up_bias   down_bias]

``up`` holds the gate projection too where ``gated``. Weights lie as transformers has them: (E, out, in), or
(E, in, out) where ``transposed``; gate and up are halves of the output axis, or alternate where ``interleaved``.
An expert gives ``weight * f(hidden)``, or ``f(weight * hidden)`` where ``gates_input`` (Llama 4).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_spec.errors import UserError

DOMAIN = "moe_edge"
VERSION = 1
OP_PREFIX = "Experts"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
FLAGS = ("gated", "interleaved", "transposed", "biased", "gates_input")
NO_LIMIT = 0.0

_IN_A_NAME = str.maketrans({".": "p", "-": "m", "+": None})
"""Signs of a number that an op's name cannot hold."""


@dataclasses.dataclass(frozen=True)
class Activation:
    """``act(gate) * (up + up_offset)``, or ``act(up)`` without a gate.

    Attributes:
        kind: one of ``ACTIVATIONS``.
        alpha: ``silu`` is ``x * sigmoid(alpha * x)``.
        limit: gate is clamped to at most this and up to [-limit, limit] before; ``NO_LIMIT`` for none.
        up_offset: added to up (gpt-oss: 1).
    """

    kind: str
    alpha: float = 1.0
    limit: float = NO_LIMIT
    up_offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class ExpertsOp:
    """One variant of the node."""

    activation: Activation
    gated: bool
    interleaved: bool
    transposed: bool
    biased: bool
    gates_input: bool = False

    @property
    def op_type(self) -> str:
        """A name for each variant, because an ONNX function has one body.

        >>> ExpertsOp(Activation("silu"), gated=True, interleaved=False, transposed=False, biased=False).op_type
        'Experts_silu_gated'
        >>> ExpertsOp(Activation("silu", limit=7.0), True, False, False, True).op_type
        'Experts_silu_limit7_gated_biased'
        """
        plain = Activation(self.activation.kind)
        numbers = [
            f"{key.replace('_', '')}{value!r}".removesuffix(".0").translate(_IN_A_NAME)
            for key, value in dataclasses.asdict(self.activation).items()
            if value != getattr(plain, key)
        ]
        flags = [flag for flag in FLAGS if getattr(self, flag)]
        return "_".join([OP_PREFIX, self.activation.kind, *numbers, *flags])

    def to_attributes(self) -> dict[str, Any]:
        """ONNX attributes of the node."""
        return {
            "activation": self.activation.kind,
            "alpha": self.activation.alpha,
            "limit": self.activation.limit,
            "up_offset": self.activation.up_offset,
            **{flag: int(getattr(self, flag)) for flag in FLAGS},
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], where: str) -> "ExpertsOp":
        """The variant that a node of an untrusted file claims to be.

        Raises:
            UserError: an attribute is missing or unknown.
        """
        try:
            kind = str(attributes["activation"])
            settings = (float(attributes[key]) for key in ("alpha", "limit", "up_offset"))
            older = {"gates_input": 0, **attributes}  # files from before it was thought of
            flags = {flag: bool(older[flag]) for flag in FLAGS}
            activation = Activation(kind, *settings)
        except (KeyError, TypeError, ValueError) as error:
            what = f"has no attribute {error}" if isinstance(error, KeyError) else f"has a wrong attribute: {error}"
            raise UserError(f"node {where} {what}", hint="export the model again with `moe-edge export`") from error
        if kind not in ACTIVATIONS:
            raise UserError(
                f"node {where} has the unknown activation {kind!r}", hint=f"known: {', '.join(ACTIVATIONS)}"
            )
        return cls(activation=activation, **flags)
