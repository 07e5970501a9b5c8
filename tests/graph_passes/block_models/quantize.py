"""Quantised experts: what a projection is stored as, and exactly what that stands for."""

import dataclasses

import ml_dtypes
import numpy as np

from tests.graph_passes.block_models.spec import Spec

FP8 = "fp8"
BITS = {"int8": 8, "uint8": 8, "int4": 4, "matmulnbits": 4}
IN_BLOCKS = ("int4", "matmulnbits")
FP8_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One projection of all experts: ``(codes - zero_points) * scales``.

    Attributes:
        codes: (E, out, in) uint8, or float8e4m3fn.
        scales: (E, 1, 1), (E, out, 1), or (E, out, in / block) in the model's type.
        zero_points: uint8 in the shape of ``scales``, or None for fp8.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None

    def dequantized(self) -> np.ndarray:
        """(E, out, in) in the type of ``scales``, rounded as DequantizeLinear does."""
        block = self.codes.shape[2] // self.scales.shape[2]
        scales = np.repeat(self.scales, block, axis=2).astype(np.float32)
        codes = self.codes.astype(np.float32)
        if self.zero_points is not None:
            codes -= np.repeat(self.zero_points, block, axis=2)
        return (codes * scales).astype(self.scales.dtype)


def quantize(spec: Spec, matrix: np.ndarray) -> Quantized:
    """``matrix`` (E, out, in), with one scale for an expert, a row or a block, whichever the form can say."""
    assert spec.quantization is not None
    parts = _parts(spec, matrix)
    if spec.quantization == FP8:
        scales = (np.abs(parts).max(-1) / FP8_MAX).astype(matrix.dtype)
        return Quantized(
            (parts / scales[..., None]).astype(ml_dtypes.float8_e4m3fn).reshape(matrix.shape), scales, None
        )
    levels = 2 ** BITS[spec.quantization]
    if spec.quantization == "uint8" or spec.zero_points:
        low, high = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
        scales = ((high - low) / (levels - 1)).astype(matrix.dtype)
        zero_points = np.round(-low / scales)
    else:
        scales = (np.abs(parts).max(-1) / (levels / 2 - 1)).astype(matrix.dtype)
        zero_points = np.full(scales.shape, levels // 2)
    codes = np.clip(np.round(parts / scales[..., None]) + zero_points[..., None], 0, levels - 1)
    return Quantized(codes.astype(np.uint8).reshape(matrix.shape), scales, zero_points.astype(np.uint8))


def pack(nibbles: np.ndarray) -> np.ndarray:
    """(..., n) of 4 bits as (..., ceil(n / 2)) bytes, the first in the lower half."""
    if nibbles.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros_like(nibbles[..., :1])], axis=-1)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _parts(spec: Spec, matrix: np.ndarray) -> np.ndarray:
    """What shares a scale along the last axis."""
    experts, rows, columns = matrix.shape
    if spec.quantization in IN_BLOCKS:
        return matrix.reshape(experts, rows, columns // spec.block, spec.block)
    if spec.form in ("masked_loop", "nonzero", "qmoe"):
        return matrix.reshape(experts, rows, 1, columns)
    return matrix.reshape(experts, 1, 1, rows * columns)
