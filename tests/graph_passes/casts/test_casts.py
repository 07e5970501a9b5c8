"""Where casts stand: graphs before and after, as text."""

import ml_dtypes
import numpy as np
import onnx
import pytest

from graph_passes.casts.assign import WIDE, Formats
from moe_spec.errors import UserError
from tests.graph_passes.casts.texts import HALVES, cast_text, formats_of, lines

NORM = """
norm (float[N, 4] x) => (float[N, 4] y)
<float[4, 4] kernel = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[4] weight = {1, 2, 3, 4},
 float eps = {0.000001}, float two = {2}, int64[1] last = {-1}> {
    hidden = MatMul(x, kernel)
    square = Pow(hidden, two)
    mean = ReduceMean(square, last)
    above_0 = Add(mean, eps)
    root = Sqrt(above_0)
    inverse = Reciprocal(root)
    normed = Mul(hidden, inverse)
    scaled = Mul(normed, weight)
    up = MatMul(scaled, kernel)
    gate = MatMul(scaled, kernel)
    sum = Add(up, gate)
    y = Add(hidden, sum)
}
"""


def test_a_norm_is_an_island_with_one_cast_at_each_shore(tmp_path):
    model = cast_text(NORM, tmp_path)
    assert lines(model) == [
        "x_float16 = Cast(x) to float16",
        "hidden = MatMul(x_float16, kernel)",
        "hidden_float32 = Cast(hidden) to float",
        "square = Pow(hidden_float32, two)",
        "mean = ReduceMean(square, last)",
        "above_0 = Add(mean, eps)",
        "root = Sqrt(above_0)",
        "inverse = Reciprocal(root)",
        "normed = Mul(hidden_float32, inverse)",
        "scaled = Mul(normed, weight)",
        "scaled_float16 = Cast(scaled) to float16",
        "up = MatMul(scaled_float16, kernel)",
        "gate = MatMul(scaled_float16, kernel)",
        "sum = Add(up, gate)",
        "y_float16 = Add(hidden, sum)",
        "y = Cast(y_float16) to float",
    ]
    assert formats_of(model) == {"kernel": "float16", "weight": "float", "eps": "float", "two": "float"}


DEQUANTISED = """
dequantised (float[N, 4] x) => (float[N, 2] y)
<int8[4, 2] values = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] scales = {0.5, SMALLEST}> {
    weight = DequantizeLinear <axis = 1> (values, scales)
    y = MatMul(x, weight)
}
"""


@pytest.mark.parametrize(("smallest", "held"), [("0.25", "float16"), ("0.000001", "float")])
def test_scales_are_looked_at_however_many_there_are(tmp_path, monkeypatch, smallest, held):
    """A scale that loses digits loses those of all that it scales."""
    monkeypatch.setattr("graph_passes.casts.assign.LARGEST_LOOKED_AT", 1)
    model = cast_text(DEQUANTISED.replace("SMALLEST", smallest), tmp_path)
    assert formats_of(model)["scales"] == held


ATTENTION = """
attention (float[N, 4] q, float[M, 4] k, bool[N, M] seen) => (float[N, 4] y)
<float[4, 4] kernel = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float scale = {0.5},
 float zero = {0}, float lowest = {LOWEST}> {
    mask = Where(seen, zero, lowest)
    query = MatMul(q, kernel)
    key = MatMul(k, kernel)
    turned = Transpose <perm = [1, 0]> (key)
    small = Mul(query, scale)
    scores = MatMul(small, turned)
    masked = Add(scores, mask)
    shares = Softmax <axis = -1> (masked)
    y = MatMul(shares, key)
}
"""


def test_a_mask_that_float16_has_not_keeps_scores_in_float32_up_to_their_softmax(tmp_path):
    model = cast_text(ATTENTION.replace("LOWEST", "-3.4028235e38"), tmp_path)
    assert lines(model)[-7:] == [
        "scores = MatMul(small, turned)",
        "scores_float32 = Cast(scores) to float",
        "masked = Add(scores_float32, mask)",
        "shares = Softmax(masked)",
        "shares_float16 = Cast(shares) to float16",
        "y_float16 = MatMul(shares_float16, key)",
        "y = Cast(y_float16) to float",
    ]
    assert formats_of(model) == {"kernel": "float16", "scale": "float16", "zero": "float", "lowest": "float"}


def test_a_softmax_is_cast_before_what_guards_it_against_rows_of_nothing(tmp_path):
    """As torch.onnx writes attention: TensorRT-RTX cannot fuse it where the cast comes later."""
    guarded = """shares = Softmax <axis = -1> (masked)
    nothing = IsNaN(shares)
    some = Where(nothing, zero, shares)
    y = MatMul(some, key)"""
    before = ATTENTION.replace("LOWEST", "-3.4028235e38")
    text = before[: before.index("shares =")] + guarded + "\n}\n"
    assert lines(cast_text(text, tmp_path))[-7:] == [
        "shares = Softmax(masked)",
        "nothing = IsNaN(shares)",
        "zero_float16 = Cast(zero) to float16",
        "shares_float16 = Cast(shares) to float16",
        "some = Where(nothing, zero_float16, shares_float16)",
        "y_float16 = MatMul(some, key)",
        "y = Cast(y_float16) to float",
    ]


def test_a_mask_that_float16_has_is_made_in_it(tmp_path):
    model = cast_text(ATTENTION.replace("LOWEST", "-10000"), tmp_path)
    assert "masked = Add(scores, mask)" in lines(model)
    assert formats_of(model) == {"kernel": "float16", "scale": "float16", "zero": "float16", "lowest": "float16"}


ROTARY = """
rotary (float[N, 4] x, int64[N, 1] positions) => (float[N, 4] y, float[N, 4] z)
<float[4, 4] kernel = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
 float[1, 4] frequencies = {1, 0.1, 0.01, 0.001}> {
    numbers = Cast <to = 1> (positions)
    angles = MatMul(numbers, frequencies)
    cos = Cos(angles)
    query = MatMul(x, kernel)
    y = Mul(query, cos)
    key = MatMul(x, kernel)
    z = Mul(key, cos)
}
"""


def test_positions_are_multiplied_in_float32_and_their_cosine_is_cast_once(tmp_path):
    model = cast_text(ROTARY, tmp_path)
    assert lines(model) == [
        "numbers = Cast(positions) to float",
        "angles = MatMul(numbers, frequencies)",
        "cos = Cos(angles)",
        "x_float16 = Cast(x) to float16",
        "query = MatMul(x_float16, kernel)",
        "cos_float16 = Cast(cos) to float16",
        "y_float16 = Mul(query, cos_float16)",
        "key = MatMul(x_float16, kernel)",
        "z_float16 = Mul(key, cos_float16)",
        "y = Cast(y_float16) to float",
        "z = Cast(z_float16) to float",
    ]
    assert formats_of(model) == {"frequencies": "float", "kernel": "float16"}


SHARED = """
shared (int64[N] ids) => (float[N, 2] y)
<float[2, 2] table = {1, 2, 3, 4}, float[2] bias = {1, 2}> {
    turned = Transpose <perm = [1, 0]> (table)
    hidden = Gather(table, ids)
    product = MatMul(hidden, turned)
    moved = Add(product, bias)
    root = Sqrt(bias)
    y = Mul(moved, root)
}
"""


def test_a_table_is_a_weight_and_what_both_sides_read_stays_float32(tmp_path):
    model = cast_text(SHARED, tmp_path)
    assert lines(model) == [
        "turned = Transpose(table)",
        "hidden = Gather(table, ids)",
        "product = MatMul(hidden, turned)",
        "bias_float16 = Cast(bias) to float16",
        "moved = Add(product, bias_float16)",
        "root = Sqrt(bias)",
        "moved_float32 = Cast(moved) to float",
        "y = Mul(moved_float32, root)",
    ]
    assert formats_of(model) == {"table": "float16", "bias": "float"}


BRANCH = """
branch (float[N, 2] x, bool flag) => (float[N, 2] y)
<float[2, 2] kernel = {1, 2, 3, 4}> {
    hidden = MatMul(x, kernel)
    chosen = If (flag) <
        then_branch = yes () => (float[N, 2] a) { a = Exp(hidden) },
        else_branch = no () => (float[N, 2] b) { b = Identity(hidden) }
    >
    y = MatMul(chosen, kernel)
}
"""


def test_bodies_compute_in_float32(tmp_path):
    assert lines(cast_text(BRANCH, tmp_path)) == [
        "x_float16 = Cast(x) to float16",
        "hidden = MatMul(x_float16, kernel)",
        "hidden_float32 = Cast(hidden) to float",
        "chosen = If(flag)",
        "chosen_float16 = Cast(chosen) to float16",
        "y_float16 = MatMul(chosen_float16, kernel)",
        "y = Cast(y_float16) to float",
    ]


CACHE = """
cache (float[1, N, 2] x, float[1, P, 2] past_0_key) => (float[1, T, 2] present_0_key)
<float[2, 2] kernel = {1, 2, 3, 4}> {
    key = MatMul(x, kernel)
    present_0_key = Concat <axis = 1> (past_0_key, key)
}
"""


def test_a_cache_has_the_format_of_what_is_kept(tmp_path):
    model = cast_text(CACHE, tmp_path)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert types == {
        "x": onnx.TensorProto.FLOAT,
        "past_key_values.0.key": onnx.TensorProto.FLOAT16,
        "present.0.key": onnx.TensorProto.FLOAT16,
    }
    assert lines(model)[-1] == "present.0.key = Concat(past_key_values.0.key, key)"


CONV = """
patches (float[N, 1, 2, 2] x) => (float[N, 1, 1, 1] y)
<float[1, 1, 2, 2] kernel = {1, 2, 3, 4}> { y = Conv(x, kernel) }
"""


@pytest.mark.parametrize(("opset", "expected"), [(20, "float"), (22, "bfloat16")])
def test_an_op_that_onnx_defines_for_no_bfloat16_stays_float32(tmp_path, opset, expected):
    formats = Formats(WIDE, np.dtype(ml_dtypes.bfloat16))
    assert formats_of(cast_text(CONV, tmp_path, formats, opset)) == {"kernel": expected}


def test_nothing_changes_where_float32_was_asked_for(tmp_path):
    assert lines(cast_text(NORM, tmp_path, Formats(WIDE, WIDE))) == [
        line.strip() for line in NORM.splitlines() if " = " in line and line.startswith("    ")
    ]


@pytest.mark.parametrize(
    ("edit", "what", "hint"),
    [
        (
            ("16}", "7e4}"),
            "weight kernel holds 70000, which float16 has not",
            "ask for bf16, whose range is that of float32",
        ),
        (
            ("y = Add(hidden, sum)", "y = other.Strange(hidden, sum)"),
            "Strange 'y' of domain 'other' is an op whose types nobody knows: nothing can be cast for it",
            "leave --precision and --rest-precision out",
        ),
    ],
)
def test_what_cannot_be_cast_is_refused(tmp_path, edit, what, hint):
    assert edit[0] in NORM
    with pytest.raises(UserError) as refusal:
        cast_text(NORM.replace(*edit), tmp_path, HALVES)
    assert (refusal.value.what, refusal.value.hint) == (what, hint)
