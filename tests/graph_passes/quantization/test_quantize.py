"""Numbers of few bits: worked ones, a reference of our own that lists what a format has, and what is done with them."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_passes.quantization.quantize import Quantization, quantized_weight, rounded_weight
from graph_passes.weights.weight import Weight, alternate, from_array, stack

HOWS = [Quantization("int8"), Quantization("int4", 32), Quantization("fp8"), Quantization("nvfp4")]
GRIDS = {
    "int8": np.arange(128.0),
    "int4": np.arange(8.0),
    "fp8": np.array(
        [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
        + [(1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)][:-1]
    ),
    "nvfp4": np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
}
"""Every number of a format that is not below 0, in the order of its codes."""


def name_of(how: Quantization) -> str:
    return f"{how.format}, {how.block_size}"


def nearest(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The entry of ``grid`` that is nearest to each value, of two as near the one with the even code."""
    distances = np.abs(np.abs(values.astype(np.float64))[..., None] - grid)
    best = distances.min(axis=-1, keepdims=True)
    codes = np.arange(len(grid)) + len(grid) * (np.arange(len(grid)) % 2)  # odd ones only where alone
    found = grid[np.where(distances == best, codes, np.inf).argmin(axis=-1)]
    return np.where(values < 0, -found, found)


def reference(weight_EIO: np.ndarray, how: Quantization) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (E, in, out), and what each is multiplied with, expert by expert, channel by channel, block by block."""
    grid, one = GRIDS[how.format], np.float32(1)
    numbers, factors = np.zeros(weight_EIO.shape), np.zeros(weight_EIO.shape, np.float32)
    whole = np.abs(weight_EIO).max() / np.float32(6 * 448) or one
    experts, inputs, outputs = weight_EIO.shape
    size = how.shared or inputs
    for expert, start, output in itertools.product(range(experts), range(0, inputs, size), range(outputs)):
        block = weight_EIO[expert, start : start + size, output]
        scale = np.float32(np.abs(block).max() / np.float32(grid[-1]))
        if how.format == "nvfp4":
            share = nearest(np.minimum(scale / whole, np.float32(448)), GRIDS["fp8"])
            scale = np.float32(np.maximum(share, 2.0**-9)) * whole
        scale = scale or one
        steps = np.clip(block / scale, -grid[-1], grid[-1])
        numbers[expert, start : start + size, output] = nearest(steps, grid)
        factors[expert, start : start + size, output] = scale
    return numbers, factors


def stands_for(weight: Weight) -> np.ndarray:
    """The numbers that a weight means."""
    if weight.scales is None:
        return weight.load().astype(np.float32)
    scales = stands_for(weight.scales)
    for axis, length in enumerate(weight.shape):
        scales = np.repeat(scales, length // scales.shape[axis], axis)
    return weight.values.load().astype(np.float32) * scales


def drawn(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def column(*values: float) -> Weight:
    return from_array(np.array(values, np.float32).reshape(1, -1, 1))


def test_integers_are_rounded_half_to_even_in_steps_of_the_largest_over_127_or_7():
    found = quantized_weight(column(7.0, 0.5, 1.5, 2.5, -2.5, -7.0), Quantization("int4"))
    assert (found.dtype.name, found.zero_points) == ("int4", None)
    assert found.values.load().ravel().tolist() == [7, 0, 2, 2, -2, -7]
    assert stands_for(quantized_weight(column(-254.0, 3.0, 5.0), Quantization("int8"))).ravel().tolist() == [-254, 4, 4]


def test_e4m3_has_three_bits_behind_the_point():
    found = quantized_weight(column(448.0, 17.0, 18.0, 19.0, -0.001, 2.0**-10), Quantization("fp8"))
    assert found.values.load().astype(np.float32).ravel().tolist() == [448, 16, 18, 20, -(2.0**-9), 0]
    assert stands_for(quantized_weight(column(-1.0, 0.5), Quantization("fp8"))).ravel().tolist() == [-1, 0.5]


def test_sixteen_numbers_of_nvfp4_share_a_scale_of_e4m3_and_all_share_one_of_float32():
    """The largest is 6: g = 6 / (6 * 448) = 1 / 448. Blocks of 6, 3 and almost 0: b = 448, 224, and the least, 2^-9."""
    first = [6.0, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -6.0, -5.0, -0.3, 0.0, 4.9, 0.26, 1.0, 3.0]
    found = quantized_weight(column(*first, *[3.0, 1.25] * 8, *[1e-5, 1e-9] * 8), Quantization("nvfp4"))
    assert found.scales is not None
    assert found.scales.scales is not None
    assert found.scales.scales.load().item() == np.float32(6) / np.float32(2688)
    assert found.scales.values.load().astype(np.float32).ravel().tolist() == [448, 224, 2.0**-9]
    numbers = found.values.load().astype(np.float32).ravel().tolist()
    assert numbers[:16] == [6, 4, 4, 2, 2, 1, 1, 0, -6, -4, -0.5, 0, 4, 0.5, 1, 3]
    assert numbers[16:20] == [6, 2, 6, 2]
    assert numbers[32:34] == [2, 0]  # 1e-5 / (2^-9 / 448) = 2.29


@pytest.mark.parametrize("how", HOWS, ids=name_of)
@settings(max_examples=20)
@given(seed=st.integers(0, 1 << 30), exponents=st.integers(0, 30), halves=st.booleans())
def test_every_number_is_that_of_the_reference(how, seed, exponents, halves):
    """``halves``: most numbers are as near to two of the format, as long as a block's largest is that of the format."""
    random, grid = np.random.default_rng(seed), GRIDS[how.format]
    weight_EIO = drawn((2, 32, 3), seed)
    if halves:
        weight_EIO = random.choice((grid[:-1] + grid[1:]) / 2, weight_EIO.shape).astype(np.float32)
        weight_EIO[:, ::16] = grid[-1]
    weight_EIO *= 2.0 ** random.integers(-exponents, exponents + 1, (2, 1, 3))
    found = quantized_weight(from_array(weight_EIO), how)
    numbers, factors = reference(weight_EIO, how)
    np.testing.assert_array_equal(found.values.load().astype(np.float64), numbers)
    np.testing.assert_array_equal(stands_for(found), numbers.astype(np.float32) * factors)


@pytest.mark.parametrize("how", HOWS, ids=name_of)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rounded_weights_are_the_quantised_ones_in_their_own_dtype(how, dtype):
    weight = from_array(drawn((3, 64, 5)).astype(dtype))
    found = quantized_weight(weight, how)
    assert found.float_dtype == dtype
    np.testing.assert_array_equal(rounded_weight(weight, how).load(), stands_for(found).astype(dtype))


@pytest.mark.parametrize("how", HOWS, ids=name_of)
def test_half_a_step_is_what_rounding_takes_away_and_nothing_the_second_time(how):
    weight = drawn((2, 64, 4))
    step = {"int8": 1, "int4": 1, "fp8": 32, "nvfp4": 2}[how.format]  # between the largest two numbers
    largest = np.abs(weight).max()
    once = rounded_weight(from_array(weight), how).load()
    # beside that, a block's scale of nvfp4 may be rounded down by 1 in 16
    rounding = largest * (step / 2 / GRIDS[how.format][-1] + (1 / 16 if how.is_double else 0))
    assert 0 < np.abs(once - weight).max() <= rounding * 1.0001
    if not how.is_double:  # whose largest number, and so every scale, may change
        np.testing.assert_array_equal(rounded_weight(from_array(once), how).load(), once)


@pytest.mark.parametrize("how", HOWS, ids=name_of)
def test_a_weight_of_zeros_stays_one(how):
    found = quantized_weight(from_array(np.zeros((2, 32, 3), np.float32)), how)
    np.testing.assert_array_equal(stands_for(found), np.zeros((2, 32, 3)))


def test_pieces_of_a_weight_share_the_scale_of_all_of_it(monkeypatch):
    """The largest number is in the last piece: a pass over the whole weight has to find it."""
    weight = drawn((6, 32, 4))
    weight[5] *= 100
    whole = quantized_weight(from_array(weight), Quantization("nvfp4"))
    wanted = whole.values.load()
    monkeypatch.setattr("graph_passes.weights.weight.PIECE_BYTES", 64)
    pieces = list(quantized_weight(from_array(weight), Quantization("nvfp4")).values.pieces())
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces), wanted)


@pytest.mark.parametrize("how", HOWS, ids=name_of)
def test_what_is_done_to_a_weight_is_done_to_scales_and_to_their_scales(how):
    weight = quantized_weight(from_array(drawn((4, 64, 32))), how)
    numbers = stands_for(weight)
    np.testing.assert_array_equal(stands_for(weight.take([3, 1])), numbers[[3, 1]])
    np.testing.assert_array_equal(stands_for(weight.one(2)), numbers[2])
    np.testing.assert_array_equal(stands_for(weight.swap()), numbers.swapaxes(1, 2))
    np.testing.assert_array_equal(stands_for(weight.half(2, 1)), numbers[..., 16:])
    np.testing.assert_array_equal(stands_for(weight.half(2, 0, interleaved=True)), numbers[..., 0::2])
    np.testing.assert_array_equal(stands_for(weight.joined()), numbers.reshape(-1, 32))
    np.testing.assert_array_equal(stands_for(weight.joined().cut(4)), numbers)
    np.testing.assert_array_equal(stands_for(stack([weight.one(index) for index in range(4)])), numbers)
    turned = weight.swap()
    np.testing.assert_array_equal(stands_for(alternate(turned, turned))[:, 1::2], numbers.swapaxes(1, 2))
