"""One expert on one token."""

from math import erf

import numpy as np

from moe_spec.experts_op import Activation
from tests.graph_passes.block_models.spec import Spec


def one_expert(spec: Spec, tensors: dict[str, np.ndarray], x: np.ndarray, expert: int) -> np.ndarray:
    """(H,) of ``x`` (H,)."""
    up, down = tensors["up"][expert], tensors["down"][expert]
    if spec.transposed:
        up, down = up.T, down.T
    projected = up @ x + (tensors["up_bias"][expert] if spec.biased else 0.0)
    activation, limit = spec.activation, spec.activation.limit or np.inf
    if spec.gated:
        gate, value = (projected[0::2], projected[1::2]) if spec.op.interleaved else np.split(projected, 2)
        value = np.clip(value, -limit, limit) + activation.up_offset
        middle = _act(activation, np.minimum(gate, limit)) * value
    else:
        middle = _act(activation, projected)
    return down @ middle + (tensors["down_bias"][expert] if spec.biased else 0.0)


def _act(activation: Activation, x: np.ndarray) -> np.ndarray:
    match activation.kind:
        case "silu":
            return x / (1 + np.exp(-activation.alpha * x))
        case "gelu":
            return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        case "relu":
            return np.maximum(x, 0)
        case _:
            return np.maximum(x, 0) ** 2
