"""Rounding as a device would: what each value is, and which one float16 has not."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph_passes.casts.assign import WIDE, Formats
from graph_passes.casts.emulate import run_emulated
from graph_passes.model_file import load_graph
from graph_passes.proof.retype import WIDENED, save_retyped
from moe_spec.errors import VerificationError
from moe_spec.manifest import MODEL
from tests.graph_passes.casts.texts import HALF, cast_text
from tests.zoo import RUNNER

TEXT = """
three (float[N, 4] x) => (float[N, 4] y)
<float[4] kernel = {3, 0.1, 7, 0.001}, float[4, 4] one = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}> {
    same = MatMul(x, one)
    product = Mul(same, kernel)
    y = Add(product, same)
}
"""


def emulated(folder, x, format_):
    cast_text(TEXT, folder, Formats(WIDE, format_))
    widened = folder / "widened"
    widened.mkdir()
    save_retyped(folder / "cast" / MODEL, widened / MODEL, WIDENED)
    return run_emulated(widened, load_graph(folder / "cast" / MODEL), [{"x": x}], RUNNER)


@pytest.mark.parametrize("format_", [HALF, np.dtype(ml_dtypes.bfloat16)], ids=lambda format_: format_.name)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.lists(st.floats(2.0**-4, 2.0**12, width=32), min_size=4, max_size=4),
    signs=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_every_value_is_the_one_that_numpy_rounds_to(tmp_path_factory, format_, numbers, signs):
    x = np.where(signs, numbers, np.negative(numbers)).astype(np.float32)[None]
    same, kernel = x.astype(format_), np.array([3, 0.1, 7, 0.001], np.float32).astype(format_)
    found = emulated(tmp_path_factory.mktemp("emulated"), x, format_)
    np.testing.assert_array_equal(found.outputs[0]["y"], (same * kernel + same).astype(np.float32))


def test_the_largest_value_is_named(tmp_path):
    largest = emulated(tmp_path, np.array([[1, 2, 4096, 7]], np.float32), HALF).largest
    assert (largest.node, largest.magnitude) == ("Add 'y_float16'", 32768.0)


def test_a_value_that_float16_has_not_is_refused_and_named(tmp_path):
    with pytest.raises(VerificationError) as refusal:
        emulated(tmp_path, np.array([[1, 2, 30000, 7]], np.float32), HALF)
    assert str(refusal.value) == (
        "Mul 'product' reaches 2.1e+05, and float16 ends at 65504; nothing was written; bf16 has the range of float32"
    )
