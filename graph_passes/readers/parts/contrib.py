"""What ONNX Runtime's two fused ops, ``com.microsoft.MoE`` and ``QMoE``, have in common: attributes, biases, layouts.

The op's documentation and its CPU kernel agree on (tested in tests/graph_passes/readers/test_moe.py)::

    relu, silu, gelu                act(fc1 x), or act(fc1 x) * (fc3 x) where there is an fc3; gelu is the tanh one
    swiglu                          G sigmoid(alpha G) (L + beta), G = min(g, limit), L = clip(l, -limit, limit)
    swiglu_fusion                   0: g is fc1, l is fc3; 1: rows of fc1 alternate; 2: halves of fc1

with alpha 1, beta 0 and no limit where the attributes are left out. (Releases before 1.24 computed swiglu with 1.702
and 1 whatever was asked for.)
"""

import dataclasses
import math
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand
from graph_passes.record.block import Experts, FormError, Router
from graph_passes.routers import Weights
from graph_passes.weights.weight import Weight
from moe_spec.experts_op import NO_LIMIT, Activation

DOMAIN = "com.microsoft"
SPARSE_MIXER_JITTER = 0.01
"""What the CUDA kernel has; the CPU kernel ignores ``use_sparse_mixer``."""

KINDS = {"relu": "relu", "silu": "silu", "gelu": "gelu_tanh", "swiglu": "silu"}
INTERLEAVED, HALVES = 1, 2


@dataclasses.dataclass(frozen=True)
class Projections:
    """The experts' weights as such an op has them: (E, out, in), biases (E, out), any of which may be left out."""

    fc1: Weight
    fc2: Weight
    fc3: Weight | None
    fc1_bias: Weight | None
    fc2_bias: Weight | None
    fc3_bias: Weight | None


def integer(node: gs.Node, key: str, default: int) -> int:
    """An attribute of an op that no checker knows.

    Raises:
        FormError: it is no whole number.
    """
    value = node.attrs.get(key, default)
    if not isinstance(value, int):
        raise FormError(f"attribute {key} is {value!r}, expected a whole number", node)
    return value


def optional(node: gs.Node, index: int, weights: Weights) -> Weight | None:
    """The weight at input ``index``; None where it is left out.

    Raises:
        FormError: it is computed.
    """
    tensor = operand(node, index)
    return None if tensor is None else weights.of(tensor)


def experts_of(node: gs.Node, parts: Projections) -> Experts:
    """The record of the experts of ``node``.

    Raises:
        FormError: an activation that is not known, or shapes that do not fit together.
    """
    activation, fusion = _activation(node), _fusion(node, has_fc3=parts.fc3 is not None)
    _check_shapes(node, parts, 2 if fusion else 1)
    fc1_EHN, down_EFH = parts.fc1.swap(), parts.fc2.swap()
    if fusion:
        kernels = [fc1_EHN.half(2, part, interleaved=fusion == INTERLEAVED) for part in (0, 1)]
        biases = [_half(parts.fc1_bias, part, fusion == INTERLEAVED) for part in (0, 1)]
        return Experts(kernels[1], kernels[0], down_EFH, biases[1], biases[0], parts.fc2_bias, activation)
    if parts.fc3 is not None:
        up_EHF = parts.fc3.swap()
        return Experts(up_EHF, fc1_EHN, down_EFH, parts.fc3_bias, parts.fc1_bias, parts.fc2_bias, activation)
    return Experts(fc1_EHN, None, down_EFH, parts.fc1_bias, None, parts.fc2_bias, activation)


def leading_axes(hidden: gs.Tensor) -> gs.Tensor | None:
    """``shaped_like`` of a block that reads ``hidden``: (T, H), or (B, S, H), or of a rank that nobody has told."""
    return None if hidden.shape is not None and len(hidden.shape) == 2 else hidden


def dtype_of(tensor: gs.Tensor) -> np.dtype[Any] | None:
    """Of a value in the graph; None where nobody has told."""
    dtype = tensor.dtype
    if dtype is None:
        return None
    return onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else np.dtype(dtype)


def check_logits(node: gs.Node, router: Router) -> None:
    """Refuse a K that the kernels refuse.

    Raises:
        FormError: it is more than there are experts.
    """
    experts = router.weight_EH.shape[0]
    if router.top_k > experts:
        raise FormError(f"k is {router.top_k}, but there are {experts} experts", node)


def sparse(node: gs.Node, router: Router) -> Router:
    """``router`` as the sparse mixer that ``use_sparse_mixer`` makes of it (https://arxiv.org/abs/2409.12136)."""
    if not integer(node, "use_sparse_mixer", 0):
        return router
    return dataclasses.replace(router, score="sparsemixer", renormalize=False, jitter_eps=SPARSE_MIXER_JITTER)


def _activation(node: gs.Node) -> Activation:
    name = str(node.attrs.get("activation_type", "relu"))
    if name not in KINDS:
        raise FormError(f"activation_type {name!r} is none of {', '.join(KINDS)}", node)
    if name != "swiglu":
        return Activation(KINDS[name])
    alpha, beta, limit = (
        _real(node, key, default)
        for key, default in (("activation_alpha", 1.0), ("activation_beta", 0.0), ("swiglu_limit", math.inf))
    )
    if not limit > 0:
        raise FormError(f"swiglu_limit is {limit:g}, expected more than 0", node)
    return Activation("silu", alpha, NO_LIMIT if math.isinf(limit) else limit, beta)


def _real(node: gs.Node, key: str, default: float) -> float:
    value = node.attrs.get(key, default)
    if not isinstance(value, float):
        raise FormError(f"attribute {key} is {value!r}, expected a number", node)
    return value


def _fusion(node: gs.Node, *, has_fc3: bool) -> int:
    """0 where fc1 is one projection, else how gate and up share it."""
    is_swiglu = node.attrs.get("activation_type") == "swiglu"
    fusion = integer(node, "swiglu_fusion", 0)
    if not is_swiglu or fusion in (INTERLEAVED, HALVES):
        return fusion if is_swiglu else 0
    if fusion == 0 and has_fc3:
        return 0
    raise FormError(f"swiglu_fusion {fusion} needs a gate of its own", node)


def _half(bias: Weight | None, part: int, interleaved: bool) -> Weight | None:
    return None if bias is None else bias.half(1, part, interleaved=interleaved)


def _check_shapes(node: gs.Node, parts: Projections, shares: int) -> None:
    stored = [weight for weight in vars(parts).values() if weight is not None]
    problem = FormError(
        f"the experts' weights have shapes {[list(weight.shape) for weight in stored]}, which do not fit together", node
    )
    if len(parts.fc1.shape) != 3 or len(parts.fc2.shape) != 3 or (shares == 2 and parts.fc3 is not None):
        raise problem
    experts, hidden, width = parts.fc2.shape
    wanted = {
        "fc1": (experts, shares * width, hidden),
        "fc3": (experts, width, hidden),
        "fc1_bias": (experts, shares * width),
        "fc2_bias": (experts, hidden),
        "fc3_bias": (experts, width),
    }
    for name, shape in wanted.items():
        weight = getattr(parts, name)
        if weight is not None and weight.shape != shape:
            raise problem
