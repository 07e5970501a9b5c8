import dataclasses
import json
import re
import sys

import numpy as np
import onnx
import onnx.parser
import PIL.Image
import pytest

from moe_spec.errors import UserError
from moe_spec.manifest import Manifest, TensorSpec
from runtime.backend import BuildOptions
from runtime.backends import open_session
from runtime.build import build
from runtime.profiles import ShapeRange, profile_to_json
from runtime.run import _batch_range, run
from runtime.targets import find_target
from tests.runtime import tiny

PIXELS = """
<ir_version: 10, opset_import: ["" : 20]>
brightness (float[batch, 1, 4, 6] pixel_values) => (float[batch, 2] logits)
<int64[3] axes = {1, 2, 3}, float[1, 2] sign = {-1.0, 1.0}>
{
   mean = ReduceMean<keepdims = 0>(pixel_values, axes)
   rows = int64[2] {-1, 1}
   column = Reshape(mean, rows)
   logits = MatMul(column, sign)
}
"""


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


@pytest.fixture
def camera(tmp_path):
    """Tells bright images from dark ones."""
    directory = tmp_path / "camera"
    directory.mkdir()
    text = PIXELS.replace("   rows = int64[2] {-1, 1}\n", "").replace("sign = {", "sign = {", 1)
    text = text.replace("<int64[3] axes", "<int64[2] rows = {-1, 1}, int64[3] axes")
    onnx.save(onnx.parser.parse_model(text), directory / "model.onnx")
    (directory / "config.json").write_text(json.dumps({"id2label": {"0": "dark", "1": "bright"}}))
    (directory / "preprocessor_config.json").write_text(
        json.dumps(
            {"size": {"height": 4, "width": 6}, "image_mean": [0.5], "image_std": [0.5], "rescale_factor": 1 / 255}
        )
    )
    return directory


def save_image(path, value):
    PIL.Image.fromarray(np.full((8, 12), value, np.uint8)).save(path)
    return path


def test_classes_are_named_and_given_probabilities(model, tmp_path):
    np.savez(tmp_path / "a.npz", x=tiny.examples(5))
    found = run(model, [tmp_path / "a.npz"], batch_size=2)
    with open_session(model) as session:
        logits = session.run({"x": tiny.examples(5)})["logits"]
    np.testing.assert_allclose(found.outputs["logits"], logits, rtol=1e-5)
    assert found.names == tuple(f"{tmp_path}/a.npz[{index}]" for index in range(5))
    assert found.classes == tuple(("boot", "coat", "shirt")[index] for index in logits.argmax(1))
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities.sum(1), 1)


def test_what_is_written_can_be_read_without_pickles(model, tmp_path):
    np.savez(tmp_path / "a.npz", x=tiny.examples(3))
    found = run(model, [tmp_path / "a.npz"], tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as saved:
        assert sorted(saved) == ["classes", "logits", "probabilities"]
        np.testing.assert_array_equal(saved["logits"], found.outputs["logits"])
        assert tuple(saved["classes"].tolist()) == found.classes


def test_images_and_npz_go_together(camera, tmp_path):
    images = [save_image(tmp_path / "bright.png", 250), save_image(tmp_path / "dark.jpg", 3)]
    np.savez(tmp_path / "more.npz", images=np.full((2, 4, 6), 200, np.uint8))
    found = run(camera, [*images, tmp_path / "more.npz"], batch_size=1)
    assert dict(zip(found.names, found.classes or (), strict=True)) == {
        f"{tmp_path}/more.npz[0]": "bright",
        f"{tmp_path}/more.npz[1]": "bright",
        f"{tmp_path}/bright.png": "bright",
        f"{tmp_path}/dark.jpg": "dark",
    }


def test_a_preprocessor_is_read_for_images_only(model, tmp_path):
    preprocessor = model / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({"size": {"longest_edge": 16777216, "shortest_edge": 65536}}))
    np.savez(tmp_path / "a.npz", x=tiny.examples(2))
    assert len(run(model, [tmp_path / "a.npz"]).names) == 2
    with pytest.raises(UserError, match=f"^{re.escape(str(preprocessor))}: key 'image_mean' is missing\n"):
        run(model, [tmp_path / "a.npz", save_image(tmp_path / "b.png", 250)])


def test_a_folder_is_its_images_in_the_order_of_their_names(camera, tmp_path):
    (tmp_path / "folder" / "more").mkdir(parents=True)
    (tmp_path / "folder" / ".cache").mkdir()
    for name in ("b.png", "a.jpg", "more/c.PNG", ".hidden.png", ".cache/d.png"):
        save_image(tmp_path / "folder" / name, 250)
    (tmp_path / "folder" / "notes.txt").touch()
    found = run(camera, [tmp_path / "folder"], batch_size=2)
    assert found.names == tuple(f"{tmp_path}/folder/{name}" for name in ("a.jpg", "b.png", "more/c.PNG"))
    assert found.classes == ("bright",) * 3


def test_a_folder_without_images_is_refused(camera, tmp_path):
    (tmp_path / "folder").mkdir()
    message = f"{tmp_path}/folder has no image (.png, .jpg, .jpeg)\nhint: give a folder of PNG or JPEG files"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(camera, [tmp_path / "folder"])


def test_json_lines_run_like_the_same_npz(model, tmp_path):
    examples = tiny.examples(5)
    np.savez(tmp_path / "a.npz", x=examples)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"x": row.tolist()}) + "\n" for row in examples))
    mine, theirs = (run(model, [tmp_path / name], batch_size=2) for name in ("a.jsonl", "a.npz"))
    np.testing.assert_array_equal(mine.outputs["logits"], theirs.outputs["logits"])
    assert mine.names == tuple(f"{tmp_path}/a.jsonl[{index}]" for index in range(5))
    assert mine.classes == theirs.classes


def test_an_engine_runs_like_its_model(model, tmp_path):
    build(model, find_target("cpu"), BuildOptions(), tmp_path / "engine")
    np.savez(tmp_path / "a.npz", x=tiny.examples(3))
    mine, theirs = (run(path, [tmp_path / "a.npz"]) for path in (model, tmp_path / "engine"))
    assert mine.classes == theirs.classes


def test_a_bare_onnx_file_gives_raw_outputs(model, tmp_path):
    np.savez(tmp_path / "a.npz", x=tiny.examples(3))
    (model / "config.json").unlink()
    found = run(model / "model.onnx", [tmp_path / "a.npz"])
    assert (found.classes, found.probabilities) == (None, None)
    assert found.outputs["logits"].shape == (3, 3)


@pytest.mark.parametrize(
    "labels",
    [
        {"0": "one", "1": "two"},
        {"1": "one", "2": "two", "3": "three"},
        {"0": 7, "1": 8, "2": 9},
        ["one", "two", "three"],
    ],
)
def test_labels_that_do_not_fit_the_outputs_name_nothing(labels, model, tmp_path):
    np.savez(tmp_path / "a.npz", x=tiny.examples(3))
    (model / "config.json").write_text(json.dumps({"id2label": labels}))
    assert run(model, [tmp_path / "a.npz"]).classes is None


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (b"[1, 2]", "holds a list, expected a JSON object"),
        (
            b'{"id2label": {"0": "caf\xe9"}}',
            "is no complete JSON: 'utf-8' codec can't decode byte 0xe9 in position 23: invalid continuation byte",
        ),
    ],
)
def test_a_config_that_is_no_object_or_no_text_is_named(config, what, model, tmp_path):
    np.savez(tmp_path / "a.npz", x=tiny.examples(3))
    (model / "config.json").write_bytes(config)
    with pytest.raises(UserError, match=f"^{re.escape(f'{model}/config.json {what}')}\nhint: export the model again$"):
        run(model, [tmp_path / "a.npz"])


def save_graph(path, text):
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g {text}'), path)
    return path


def test_an_output_without_axes_has_a_value_for_each_batch(tmp_path):
    text = "(float[n, 2] x) => (float[n, 2] y, float loss) { y = Relu(x) \n loss = ReduceSum<keepdims = 0>(y) }"
    np.savez(tmp_path / "a.npz", x=np.ones((5, 2), np.float32))
    found = run(save_graph(tmp_path / "g.onnx", text), [tmp_path / "a.npz"], batch_size=2)
    assert (found.outputs["y"].shape, found.outputs["loss"].tolist()) == ((5, 2), [4, 4, 2])


def test_an_output_may_have_the_name_of_an_argument_of_numpy(tmp_path):
    path = save_graph(
        tmp_path / "g.onnx", "(float[n] x) => (float[n] file, float[n] y) { file = Relu(x) \n y = Neg(x) }"
    )
    np.savez(tmp_path / "a.npz", x=np.arange(3, dtype=np.float32))
    run(path, [tmp_path / "a.npz"], tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as saved:
        assert {name: saved[name].tolist() for name in saved} == {"file": [0, 1, 2], "y": [0, -1, -2]}


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_model_with_a_fixed_batch_runs_any_number_of_examples(batch_size, tmp_path):
    types = "(float[4, 2] x) => (float[4, 2] y, float[8] rows) <int64[1] flat = {-1}>"
    text = f"{types} {{ y = Neg(x) \n rows = Reshape(y, flat) }}"
    examples = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.savez(tmp_path / "a.npz", x=examples)
    found = run(save_graph(tmp_path / "g.onnx", text), [tmp_path / "a.npz"], batch_size=batch_size)
    np.testing.assert_array_equal(found.outputs["y"], -examples)
    np.testing.assert_array_equal(found.outputs["rows"], -examples.ravel())
    assert found.names == tuple(f"{tmp_path}/a.npz[{index}]" for index in range(6))


def test_the_profiles_of_an_engine_say_how_many_examples_it_takes(model, tmp_path):
    inputs = (TensorSpec("x", "float32", ("batch", 8)),)
    assert _batch_range(model, inputs) == (1, sys.maxsize)
    profiles = [{"x": ShapeRange((least, 8), (most, 8), (most, 8))} for least, most in ((32, 32), (8, 16))]
    details = {"profiles": [profile_to_json(profile) for profile in profiles]}
    dataclasses.replace(Manifest.load(model), details=details).save(model)
    assert _batch_range(model, inputs) == (8, 32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": tiny.examples(2)}, "{model}: inputs are y, expected x\nhint: name the arrays like the model's inputs"),
        (
            {"x": tiny.examples(2).astype(np.float64)},
            "{model}: input x is float64[2, 5, 8], expected float32[batch, sequence, 8]\n"
            "hint: store it as float32: array.astype('float32')",
        ),
        (
            {"x": tiny.examples(2)[..., :3]},
            "{model}: input x is float32[2, 5, 3], expected float32[batch, sequence, 8]\n"
            "hint: check what the axes mean; examples are on axis 0",
        ),
    ],
)
def test_wrong_names_types_and_shapes_are_refused(model, tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=f"^{re.escape(message.format(model=model))}$"):
        run(model, [tmp_path / "a.npz"], tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_an_image_for_a_model_without_a_preprocessor_is_refused(model, tmp_path):
    path = save_image(tmp_path / "a.png", 0)
    message = (
        f"{path} is an image, but {model} has no preprocessor_config.json\n"
        "hint: give a model that takes images, or store model inputs in an .npz"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(model, [path])


def test_outputs_of_different_lengths_are_not_mixed(tmp_path):
    path = save_graph(tmp_path / "g.onnx", "(float[n, m] x) => (float[n, m] y) { y = Relu(x) }")
    for length in (2, 3):
        np.savez(tmp_path / f"{length}.npz", x=np.zeros((1, length), np.float32))
    message = "the inputs give outputs of different shapes: y\nhint: run files of one length at a time"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(path, [tmp_path / "2.npz", tmp_path / "3.npz"])


def test_outputs_are_checked_before_any_work(model, tmp_path):
    (tmp_path / "out.npz").touch()
    message = f"{tmp_path}/out.npz already exists\nhint: give another -o, or remove it first: rm -r {tmp_path}/out.npz"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(model, [], tmp_path / "out.npz")
    message = f"{tmp_path}/out.json is no .npz\nhint: write to {tmp_path}/out.npz"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(model, [], tmp_path / "out.json")


def test_without_inputs_there_is_nothing_to_run(model):
    with pytest.raises(
        UserError, match=r"^there is nothing to run\nhint: give \.npz, \.jsonl or image files with --input$"
    ):
        run(model, [])
