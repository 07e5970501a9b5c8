import dataclasses
import re

import pytest

from moe_spec.errors import UserError
from moe_spec.manifest import Manifest, TensorSpec
from runtime.backend import BuildOptions
from runtime.build import build
from runtime.fit import NO, SOME, UNKNOWN, YES, targets
from runtime.model_dir import model_bytes
from runtime.profiles import ShapeRange
from runtime.targets import TARGETS, find_target
from tests.runtime import tiny


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def with_cache(model):
    """As the manifest of a decoder: two layers' keys of 2 heads of 4 in fp16, in and out."""
    manifest = Manifest.load(model)
    ids = TensorSpec("input_ids", "int64", ("batch", "new"))
    mask = TensorSpec("attention_mask", "int64", ("batch", "past + new"))
    past = [TensorSpec(f"past_key_values.{n}.key", "float16", ("batch", 2, "past", 4)) for n in (0, 1)]
    present = [TensorSpec(f"present.{n}.key", "float16", ("batch", 2, "past + new", 4)) for n in (0, 1)]
    logits = TensorSpec("logits", "float32", ("batch", "new", 10))
    dataclasses.replace(manifest, inputs=(ids, mask, *past), outputs=(logits, *present)).save(model)
    return model


def of(batch, new, past):
    shapes: dict[str, tuple[int, ...]] = {"input_ids": (batch, new), "attention_mask": (batch, past + new)}
    shapes |= {f"past_key_values.{n}.key": (batch, 2, past, 4) for n in (0, 1)}
    return {name: ShapeRange(shape, shape, shape) for name, shape in shapes.items()}


def test_the_cache_of_a_decoder_is_counted_in_and_out_at_the_largest_shapes(model):
    (row,) = targets(with_cache(model), ["rtx-ada"], [of(1, 40, 8), of(3, 1, 20)])
    assert row.cache == 2 * 2 * 4 * 2 * 3 * (20 + 21)
    assert row.tensors == (40 + 48) * 8 + 40 * 10 * 4
    assert row.weights == model_bytes(model)
    assert row.needs == row.weights + row.cache + row.tensors
    assert row.activations is None


def test_every_target_has_a_row_and_says_why_it_does_not_take_a_model(tmp_path):
    model = tiny.write(tmp_path / "model")
    (model / "manifest.json").write_text((model / "manifest.json").read_text().replace('"dense"', '"sorted"'))
    rows = targets(model)
    assert [row.target for row in rows] == [target.name for target in TARGETS]
    assert [row.target for row in rows if not row.why_not] == [
        "onnxruntime-cpu",
        "onnxruntime-arm64",
        "onnxruntime-cuda",
    ]


def test_memory_is_judged_by_the_smallest_and_the_largest_device(model):
    (row,) = targets(model, ["jetson-orin"])
    assert row.memory == (4_000_000_000, 64_000_000_000)
    assert (row.fits, row.builds) == (YES, YES)
    assert dataclasses.replace(row, weights=5_000_000_000).fits == SOME
    assert dataclasses.replace(row, weights=65_000_000_000).fits == NO
    assert dataclasses.replace(row, build=65_000_000_000).builds == NO
    (row,) = targets(model, ["jetson-orin"], memory=1000)
    assert (row.memory, row.fits) == ((1000, 1000), NO)


def test_nothing_is_said_of_memory_that_is_not_known_or_not_where_the_build_is(model):
    cpu, ada, spark = targets(model, ["cpu", "rtx-ada", "dgx-spark"])
    assert (cpu.fits, cpu.builds) == (UNKNOWN, UNKNOWN)
    assert (ada.fits, ada.builds) == (spark.fits, spark.builds) == (YES, UNKNOWN)


def test_an_engine_fits_its_own_target(model, tmp_path):
    build(model, find_target("cpu"), BuildOptions(), tmp_path / "engine")
    (row,) = targets(tmp_path / "engine", ["rtx-ada"])
    assert (row.target, row.build, row.why_not) == ("onnxruntime-cpu", 0, ())
    assert row.weights == model_bytes(tmp_path / "engine")


def test_what_is_no_model_directory_is_named(tmp_path):
    message = f"{tmp_path} is no model directory: it has no model.onnx\nhint: give what export or optimize wrote"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        targets(tmp_path)


def test_shapes_that_do_not_fit_the_model_are_refused(model):
    with pytest.raises(UserError, match="the profile names y, but the model's inputs are x"):
        targets(model, profiles=[{"y": ShapeRange((1,), (1,), (1,))}])
