"""Quantise weights that are float: symmetric, round half to even, weight by weight, while they are written.

Of each output channel, or of each run of ``block_size`` inputs of one, with L the largest number of the format::

    int8, int4, fp8 (e4m3)    s = max |w| / L              q = round(w / s)    w' = q s
    nvfp4 (e2m1)              s = g b,  g = max of the whole tensor |w| / (6 * 448),  b = e4m3(max |w| / (6 g))

``s`` is float32 (1 where all of ``w`` is 0). In nvfp4 sixteen inputs share ``b``, which is at least the smallest number
that e4m3 has, and every expert of a projection shares ``g``. All is computed in float32. Routers and biases are never
quantised: a router that is quantised selects other experts.

Formats of floats: https://arxiv.org/abs/2209.05433 (fp8), https://arxiv.org/abs/2509.25149 (nvfp4).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from graph_passes.record.block import Experts
from graph_passes.weights.weight import Array, Weight


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Numbers of few bits.

    Attributes:
        dtype: that they are stored in.
        largest: the largest of them.
        block_size: inputs that share a scale; None: as many as a user says.
    """

    dtype: np.dtype[Any]
    largest: float
    block_size: int | None = None


NUMBERS: Mapping[str, Numbers] = {
    "int8": Numbers(np.dtype(np.int8), 127.0),
    "int4": Numbers(np.dtype(ml_dtypes.int4), 7.0),
    "fp8": Numbers(np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
    "nvfp4": Numbers(np.dtype(ml_dtypes.float4_e2m1fn), 6.0, block_size=16),
}
IN_BLOCKS = ("int8", "int4")
"""Formats whose scales are shared by as many inputs as a user says."""

BLOCK_SIZES = (32, 64, 128)

BLOCK_SCALE = NUMBERS["fp8"]
"""Of the scales that blocks of nvfp4 have."""

SMALLEST_BLOCK_SCALE = np.float32(2.0**-9)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How weights are quantised.

    Attributes:
        format: one of `NUMBERS`.
        block_size: inputs that share a scale, one of `BLOCK_SIZES`, in formats of `IN_BLOCKS`; None: all inputs of an
            output channel, or as many as the format says.
    """

    format: str
    block_size: int | None = None

    @property
    def numbers(self) -> Numbers:
        """The format's row of `NUMBERS`."""
        return NUMBERS[self.format]

    @property
    def shared(self) -> int | None:
        """Inputs that share a scale; None: all of an output channel."""
        return self.numbers.block_size or self.block_size

    @property
    def is_double(self) -> bool:
        """Whether scales have a scale themselves."""
        return self.numbers.block_size is not None


def is_quantized(experts: Experts, how: Quantization) -> bool:
    """Whether the weights of ``experts`` are quantised just so already."""
    return all(
        has(weight, how) for weight in (experts.gate_EHF, experts.up_EHF, experts.down_EFH) if weight is not None
    )


def has(weight: Weight, how: Quantization) -> bool:
    """Whether (E, in, out) has this format, signed or not, and a scale for each output and block."""
    if weight.scales is None or weight.dtype.name.removeprefix("u") != how.numbers.dtype.name:
        return False
    experts, inputs, outputs = weight.shape
    blocks = 1 if how.shared is None else inputs // how.shared
    return weight.scales.shape == (experts, blocks, outputs) and (weight.scales.scales is not None) == how.is_double


def why_not(experts: Experts, how: Quantization) -> str | None:
    """Why ``experts`` cannot be quantised so; None where they can."""
    if any(weight.scales is not None for weight in experts.weights()):
        return "its weights are quantised already"
    _, hidden, width = experts.up_EHF.shape
    if how.shared is not None and (hidden % how.shared or width % how.shared):
        return f"H={hidden} and F={width} are no multiples of the block size {how.shared}"
    return None


def quantized(experts: Experts, how: Quantization) -> Experts:
    """``experts`` with quantised projections; nothing is computed before it is written."""
    return _each(experts, lambda weight: quantized_weight(weight, how))


def rounded(experts: Experts, how: Quantization) -> Experts:
    """``experts`` in their own dtype, with the values of ``quantized``: the result is proven against them."""
    return _each(experts, lambda weight: rounded_weight(weight, how))


def _each(experts: Experts, change: Callable[[Weight], Weight]) -> Experts:
    return dataclasses.replace(
        experts,
        up_EHF=change(experts.up_EHF),
        gate_EHF=None if experts.gate_EHF is None else change(experts.gate_EHF),
        down_EFH=change(experts.down_EFH),
    )


def rounded_weight(weight: Weight, how: Quantization) -> Weight:
    """(E, in, out) in its own dtype, with the values of `quantized_weight`."""
    whole = _scale_of_scales(weight, how)

    def rows(array: Array) -> Array:
        scales = _factors(_scales(array, how, whole), whole)
        return _blocks_to_rows(_steps(array, scales, how).astype(np.float32) * scales[..., None]).astype(weight.dtype)

    return _by_output(weight, lambda stored: stored.map(stored.shape, rows, row_wise=True))


def quantized_weight(weight: Weight, how: Quantization) -> Weight:
    """(E, in, out) quantised; it is read once more where the scales have a scale."""
    whole = _scale_of_scales(weight, how)

    def values(array: Array) -> Array:
        return _blocks_to_rows(_steps(array, _factors(_scales(array, how, whole), whole), how))

    def change(stored: Weight) -> Weight:
        experts, outputs, inputs = stored.shape
        blocks = 1 if how.shared is None else inputs // how.shared
        scales = stored.map((experts, outputs, blocks), lambda array: _scales(array, how, whole), row_wise=True)
        dtype = np.dtype(np.float32) if whole is None else BLOCK_SCALE.dtype
        return dataclasses.replace(
            stored.map(stored.shape, values, row_wise=True),
            dtype=how.numbers.dtype,
            scales=dataclasses.replace(scales, dtype=dtype, scales=whole),
            cast_to=None if stored.dtype == np.float32 else stored.dtype,
        )

    return _by_output(weight, change)


def _by_output(weight: Weight, change: Callable[[Weight], Weight]) -> Weight:
    """``change`` of (E, in, out) seen as (E, out, in)."""
    return change(weight.swap()).swap()


def _scale_of_scales(weight: Weight, how: Quantization) -> Weight | None:
    """(1, 1, 1) float32 ``g``, found in a pass over the weight that keeps a number of each piece; None without."""
    if not how.is_double:
        return None

    @functools.cache
    def read() -> Array:
        largest = max(float(np.abs(piece.astype(np.float32)).max(initial=0.0)) for piece in weight.pieces())
        scale = np.float32(largest) / np.float32(how.numbers.largest * BLOCK_SCALE.largest)
        return np.full((1, 1, 1), scale or 1, np.float32)

    return Weight((1, 1, 1), np.dtype(np.float32), lambda _: read(), 1)


def _scales(array: Array, how: Quantization, whole: Weight | None) -> Array:
    """(E, out, blocks) of (E, out, in) as they are stored: float32, or e4m3 where ``whole`` multiplies them."""
    largest = np.abs(_in_blocks(array, how)).max(axis=-1)
    scales = largest / np.float32(how.numbers.largest)
    if whole is None:
        return np.where(scales == 0, np.float32(1), scales).astype(np.float32)
    shares = (scales / whole.load()).astype(np.float32)
    limited: Array = np.clip(shares, SMALLEST_BLOCK_SCALE, np.float32(BLOCK_SCALE.largest))
    return limited.astype(BLOCK_SCALE.dtype)


def _factors(scales: Array, whole: Weight | None) -> Array:
    """What numbers are multiplied with, float32."""
    return scales if whole is None else scales.astype(np.float32) * whole.load()


def _steps(array: Array, scales: Array, how: Quantization) -> Array:
    """(E, out, blocks, inputs of a block) in the format: how many scales each weight is."""
    numbers = how.numbers
    steps: Array = np.clip(_in_blocks(array, how) / scales[..., None], -numbers.largest, numbers.largest)
    if "int" in numbers.dtype.name:
        return np.rint(steps).astype(np.int8).astype(numbers.dtype)
    return steps.astype(numbers.dtype)


def _in_blocks(array: Array, how: Quantization) -> Array:
    return array.astype(np.float32).reshape(*array.shape[:2], -1, how.shared or array.shape[2])


def _blocks_to_rows(array: Array) -> Array:
    return array.reshape(*array.shape[:2], -1)
