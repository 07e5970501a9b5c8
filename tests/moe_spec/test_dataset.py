import io
import json
import zipfile

import numpy as np
import pytest

import moe_spec.dataset
from moe_spec.dataset import load_dataset
from moe_spec.errors import UserError
from moe_spec.files import sha256_file

GREY = {"size": {"height": 2, "width": 3}, "image_mean": [0.5], "image_std": [0.25], "rescale_factor": 1 / 255}
COLOUR = GREY | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
QWEN3_VL = COLOUR | {"size": {"longest_edge": 16777216, "shortest_edge": 65536}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.npz"


def model(directory, preprocessor):
    """A model with that preprocessor_config.json."""
    directory.mkdir()
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


@pytest.fixture
def grey(tmp_path):
    return model(tmp_path / "grey", GREY)


def refusal(path, *models):
    with pytest.raises(UserError) as caught:
        load_dataset(path, *models)
    return caught.value.what


def test_arrays_are_feeds_and_labels_are_not(path):
    np.savez(path, input_ids=np.arange(6).reshape(3, 2), labels=np.array([1, 0, 2], np.uint8))
    data = load_dataset(path)
    assert set(data.feeds) == {"input_ids"}
    assert (len(data), data.sha256) == (3, sha256_file(path))
    assert data.labels is not None
    np.testing.assert_array_equal(data.labels, np.array([1, 0, 2], np.int64), strict=True)


def test_the_first_examples_keep_their_labels(path):
    np.savez(path, x=np.arange(5), labels=np.arange(5))
    first = load_dataset(path).first(2)
    assert first.labels is not None
    assert (len(first), first.feeds["x"].tolist(), first.labels.tolist()) == (2, [0, 1], [0, 1])


def test_batches_hold_every_example_once(path):
    np.savez(path, x=np.arange(7), y=np.arange(7) * 10)
    batches = list(load_dataset(path).batches(3))
    assert [len(batch["x"]) for batch in batches] == [3, 3, 1]
    assert np.concatenate([batch["y"] for batch in batches]).tolist() == list(range(0, 70, 10))


def test_images_become_pixel_values(path, grey):
    images = np.array([[[0, 255, 51], [102, 153, 204]]], np.uint8)
    np.savez(path, images=images)
    pixels = load_dataset(path, grey).feeds["pixel_values"]
    expected = np.array([[[[-2, 2, -1.2], [-0.4, 0.4, 1.2]]]], np.float32)
    np.testing.assert_allclose(pixels, expected, atol=1e-6, strict=True)


def test_the_first_model_with_a_preprocessor_says_what_becomes_of_images(path, grey, tmp_path):
    np.savez(path, images=np.zeros((1, 2, 3), np.uint8))
    (tmp_path / "without").mkdir()
    pixels = load_dataset(path, tmp_path / "without", grey / "model.onnx").feeds["pixel_values"]
    assert pixels.tolist() == [[[[-2] * 3] * 2]]


def test_without_images_no_preprocessor_is_read(path, tmp_path):
    qwen = model(tmp_path / "qwen", QWEN3_VL)
    np.savez(path, input_ids=np.ones((3, 2), np.int64))
    assert load_dataset(path, qwen).feeds["input_ids"].shape == (3, 2)
    np.savez(path, images=np.zeros((1, 2, 3), np.uint8))
    assert refusal(path, qwen) == f"{qwen}/preprocessor_config.json: size: key 'height' is missing"


def test_images_without_a_preprocessor_are_refused(path, tmp_path):
    np.savez(path, images=np.zeros((1, 2, 3), np.uint8))
    message = f"{path} holds images, but the model has no preprocessor_config.json"
    assert (refusal(path), refusal(path, tmp_path)) == (message, message)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (np.zeros((4, 3, 2), np.uint8), "uint8[4, 3, 2]"),
        (np.zeros((4, 2, 3), np.float32), "float32[4, 2, 3]"),
        (np.zeros((4, 2, 3, 3), np.uint8), "uint8[4, 2, 3, 3]"),
        (np.zeros(4, np.uint8), "uint8[4]"),
    ],
)
def test_images_of_another_kind_are_refused(images, found, path, grey):
    np.savez(path, images=images)
    assert refusal(path, grey) == f"{path}: images are {found}, expected uint8 [N, 2, 3]"


def test_colour_images_say_so(path, tmp_path):
    np.savez(path, images=np.zeros((4, 2, 3), np.uint8))
    colour = model(tmp_path / "colour", COLOUR)
    assert refusal(path, colour) == f"{path}: images are uint8[4, 2, 3], expected uint8 [N, 2, 3, 3]"


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({}, "{}"),
        ({"labels": np.zeros(3)}, "{}"),
        ({"x": np.zeros((0, 4))}, "{'x': 0}"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, "{'x': 3, 'y': 4}"),
        ({"x": np.zeros(3), "y": np.float32(1)}, "{'x': 3}"),
    ],
)
def test_arrays_without_a_common_number_of_examples_are_refused(arrays, found, path):
    np.savez(path, **arrays)
    expected = f"{path} holds examples {found}, expected arrays with the same number of examples, at least one"
    assert refusal(path) == expected


@pytest.mark.parametrize(
    ("labels", "found"),
    [(np.zeros(2, int), "int64[2]"), (np.zeros((3, 2), int), "int64[3, 2]"), (np.zeros(3), "float64[3]")],
)
def test_labels_are_one_whole_number_an_example(labels, found, path):
    np.savez(path, x=np.zeros(3), labels=labels)
    assert refusal(path) == f"{path} holds {found} labels for 3 examples"


def test_what_is_no_npz_is_refused(path, tmp_path):
    assert refusal(path) == f"{path} does not exist, expected task data (.npz)"
    assert refusal(tmp_path) == f"{tmp_path} is a directory, expected task data (.npz)"
    path.write_bytes(b"no zip")
    assert refusal(path) == f"{path} is no readable .npz: File is not a zip file"
    np.save(tmp_path / "data.npy", np.zeros(3))
    assert refusal(tmp_path / "data.npy").endswith("is no readable .npz: File is not a zip file")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_cut_npz_is_refused(share, path):
    np.savez_compressed(path, x=np.random.default_rng(0).random(1000))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert refusal(path) == f"{path} is no readable .npz: File is not a zip file"


def test_a_spoilt_byte_is_refused(path):
    np.savez_compressed(path, x=np.random.default_rng(0).random(1000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} is no readable .npz: ")


def test_a_spoilt_array_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00 no header")
    assert refusal(path).startswith(f"{path} is no readable .npz: ")


def test_a_member_that_is_no_array_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert refusal(path) == f"{path} is no readable .npz: 'notes.txt' is no array"


def test_pickled_objects_are_refused_unread(path):
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    assert refusal(path).startswith(f"{path} is no readable .npz: Object arrays cannot be loaded")


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_is_unpacked(path, monkeypatch):
    monkeypatch.setattr(moe_spec.dataset, "MAX_BYTES", 1000)
    np.savez_compressed(path, x=np.zeros(1000))
    assert refusal(path) == f"{path} unpacks to {1000 * 8 + 128} bytes, more than 1000"


def test_a_header_that_promises_more_than_the_archive_holds_is_refused(path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    assert refusal(path).startswith(f"{path} is no readable .npz: ")
