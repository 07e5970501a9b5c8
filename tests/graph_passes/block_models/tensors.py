"""The numbers in a hand-written model: random, in transformers' layout, and as they read once stored."""

import ml_dtypes
import numpy as np

from tests.graph_passes.block_models.quantize import quantize
from tests.graph_passes.block_models.spec import Spec

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

SPREAD, SPREAD_IN_A_ROW = 0.5, 0.25
"""Of weights: smaller in layers in a row, whose sum would grow until a float32 sigmoid of some logits is 0."""


def weights(spec: Spec, layer: int = 0) -> dict[str, np.ndarray]:
    """Random weights in transformers' layout; where they are quantised, what the stored ones stand for."""
    tensors = drawn(spec, layer)
    if spec.quantization is None:
        return tensors
    parts = {part: quantize(spec, matrix).dequantized() for part, matrix in matrices(spec, tensors).items()}
    down = parts.pop("down_proj")
    up = _joined(spec, list(parts.values()))
    if spec.transposed:
        up, down = up.transpose(0, 2, 1), down.transpose(0, 2, 1)
    return tensors | {"up": up, "down": down}


def drawn(spec: Spec, layer: int) -> dict[str, np.ndarray]:
    """The weights before they are quantised."""
    rng = np.random.default_rng(spec.seed if spec.tied else spec.seed + layer)
    E, H, F = spec.experts, spec.hidden, spec.width * (2 if spec.gated else 1)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, SPREAD if spec.layers == 1 else SPREAD_IN_A_ROW, shape).astype(DTYPES[spec.dtype])

    up, down = draw(E, F, H), draw(E, H, spec.width)
    if spec.transposed:
        up, down = (np.ascontiguousarray(array.transpose(0, 2, 1)) for array in (up, down))
    return {
        "router": draw(E, H),
        "router_bias": draw(E),
        "selection_bias": draw(E),
        "up": up,
        "down": down,
        "up_bias": draw(E, F),
        "down_bias": draw(E, H),
        "own_scales": draw(E),
    }


def matrices(spec: Spec, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(E, out, in) of every projection by the name that transformers gives it, gate and up apart where ``separate``."""
    up, down = (array.transpose(0, 2, 1) if spec.transposed else array for array in (tensors["up"], tensors["down"]))
    return _projections(spec, up) | {"down_proj": down}


def vectors(spec: Spec, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(E, out) of every bias, by the name of its projection."""
    if not spec.biased:
        return {}
    return _projections(spec, tensors["up_bias"]) | {"down_proj": tensors["down_bias"]}


def _projections(spec: Spec, up: np.ndarray) -> dict[str, np.ndarray]:
    if not spec.gated:
        return {"up_proj": up}
    if not spec.separate:
        return {"gate_up_proj": up}
    gate, value = (up[:, 0::2], up[:, 1::2]) if spec.op.interleaved else np.split(up, 2, axis=1)
    return {"gate_proj": gate, "up_proj": value}


def _joined(spec: Spec, parts: list[np.ndarray]) -> np.ndarray:
    """(E, out, in) of gate and up as one matrix."""
    if len(parts) == 1:
        return parts[0]
    if not spec.op.interleaved:
        return np.concatenate(parts, axis=1)
    joined = np.stack(parts, axis=2)
    return joined.reshape(joined.shape[0], -1, joined.shape[3])
