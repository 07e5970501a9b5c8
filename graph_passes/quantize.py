"""Quantise experts that are float: symmetric, round half to even, weight by weight, while they are written.

For each output channel, or each run of ``block_size`` inputs of one::

    s = max |w| / (2^(bits - 1) - 1)        q = round(w / s) + 2^(bits - 1)        w' = (q - 2^(bits - 1)) s

``s`` is float32 (1 where all of ``w`` is 0) and q is stored unsigned, as ``com.microsoft.QMoE`` and MatMulNBits want
it. Routers and biases are never quantised: a router that is quantised selects other experts.
"""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from graph_passes.block import Experts
from graph_passes.weights import Array, Weight, from_array

DTYPES = {4: np.dtype(ml_dtypes.uint4), 8: np.dtype(np.uint8)}
BLOCK_SIZES = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How experts are quantised.

    Attributes:
        bits: 4 or 8.
        block_size: inputs that share a scale, one of ``BLOCK_SIZES``; None: all inputs of an output channel.
    """

    bits: int
    block_size: int | None = None


def is_quantized(experts: Experts, how: Quantization) -> bool:
    """Whether the weights of ``experts`` are quantised just so already."""
    return all(
        _has(weight, how) for weight in (experts.gate_EHF, experts.up_EHF, experts.down_EFH) if weight is not None
    )


def _has(weight: Weight, how: Quantization) -> bool:
    """Whether (E, in, out) has these bits, and a scale for each output and block."""
    experts, inputs, outputs = weight.shape
    blocks = 1 if how.block_size is None else inputs // how.block_size
    wanted = (experts, blocks, outputs)
    return weight.dtype == DTYPES[how.bits] and weight.scales is not None and weight.scales.shape == wanted


def why_not(experts: Experts, how: Quantization) -> str | None:
    """Why ``experts`` cannot be quantised so; None where they can."""
    if any(weight.scales is not None for weight in experts.weights()):
        return "its weights are quantised already"
    _, hidden, width = experts.up_EHF.shape
    if how.block_size is not None and (hidden % how.block_size or width % how.block_size):
        return f"H={hidden} and F={width} are no multiples of the block size {how.block_size}"
    return None


def quantized(experts: Experts, how: Quantization) -> Experts:
    """``experts`` with quantised projections; nothing is computed before it is written."""
    return _each(experts, lambda weight: _quantized(weight, how))


def rounded(experts: Experts, how: Quantization) -> Experts:
    """``experts`` in their own dtype, with the values of ``quantized``: the result is proven against them."""

    def change(weight: Weight) -> Weight:
        def rows(array: Array) -> Array:
            scales = _scales(array, how)
            return _blocks_to_rows(_steps(array, scales, how) * scales[..., None]).astype(weight.dtype)

        return _by_output(weight, lambda stored: stored.map(stored.shape, rows, row_wise=True))

    return _each(experts, change)


def _each(experts: Experts, change: Callable[[Weight], Weight]) -> Experts:
    return dataclasses.replace(
        experts,
        up_EHF=change(experts.up_EHF),
        gate_EHF=None if experts.gate_EHF is None else change(experts.gate_EHF),
        down_EFH=change(experts.down_EFH),
    )


def _quantized(weight: Weight, how: Quantization) -> Weight:
    middle, dtype = 2 ** (how.bits - 1), DTYPES[how.bits]

    def values(array: Array) -> Array:
        return _blocks_to_rows(_steps(array, _scales(array, how), how) + middle).astype(np.uint8).astype(dtype)

    def change(stored: Weight) -> Weight:
        experts, outputs, inputs = stored.shape
        blocks = 1 if how.block_size is None else inputs // how.block_size
        scales = stored.map((experts, outputs, blocks), lambda array: _scales(array, how), row_wise=True)
        return dataclasses.replace(
            stored.map(stored.shape, values, row_wise=True),
            dtype=dtype,
            scales=dataclasses.replace(scales, dtype=np.dtype(np.float32)),
            zero_points=from_array(np.full((1, 1, 1), middle).astype(dtype)),
            cast_to=None if stored.dtype == np.float32 else stored.dtype,
        )

    return _by_output(weight, change)


def _by_output(weight: Weight, change: Callable[[Weight], Weight]) -> Weight:
    """``change`` of (E, in, out) seen as (E, out, in)."""
    return change(weight.swap()).swap()


def _scales(array: Array, how: Quantization) -> Array:
    """(E, out, blocks) float32 of (E, out, in)."""
    largest = np.abs(_in_blocks(array, how)).max(axis=-1)
    return np.where(largest == 0, np.float32(1), largest / np.float32(2 ** (how.bits - 1) - 1)).astype(np.float32)


def _steps(array: Array, scales: Array, how: Quantization) -> Array:
    """(E, out, blocks, inputs of a block): how many scales each weight is, as whole numbers."""
    limit = 2 ** (how.bits - 1) - 1
    return np.clip(np.rint(_in_blocks(array, how) / scales[..., None]), -limit, limit)


def _in_blocks(array: Array, how: Quantization) -> Array:
    return array.astype(np.float32).reshape(*array.shape[:2], -1, how.block_size or array.shape[2])


def _blocks_to_rows(array: Array) -> Array:
    return array.reshape(*array.shape[:2], -1)
