import json
import re

import numpy as np
import pytest

from moe_spec.errors import UserError
from moe_spec.images import ImagePreprocessor

CONFIG = {"size": {"height": 4, "width": 6}, "image_mean": [0.5], "image_std": [1], "rescale_factor": 0.25}


def write(directory, **changes):
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps({key: value for key, value in (CONFIG | changes).items() if value is not None}))
    return path


def test_a_model_without_images_has_no_preprocessor(tmp_path):
    assert ImagePreprocessor.load(tmp_path) is None


def test_a_preprocessor_is_what_its_file_says(tmp_path):
    write(tmp_path)
    assert ImagePreprocessor.load(tmp_path) == ImagePreprocessor(4, 6, mean=(0.5,), std=(1.0,), rescale_factor=0.25)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"do_normalize": False}, ImagePreprocessor(4, 6, mean=(0.0,), std=(1.0,), rescale_factor=0.25)),
        ({"do_rescale": False}, ImagePreprocessor(4, 6, mean=(0.5,), std=(1.0,), rescale_factor=1.0)),
        ({"rescale_factor": None}, ImagePreprocessor(4, 6, mean=(0.5,), std=(1.0,), rescale_factor=1 / 255)),
        ({"do_center_crop": False, "do_rescale": True, "do_normalize": True}, None),
    ],
)
def test_what_is_not_to_be_done_is_not_done(changes, expected, tmp_path):
    write(tmp_path)
    unchanged = ImagePreprocessor.load(tmp_path)
    write(tmp_path, **changes)
    assert ImagePreprocessor.load(tmp_path) == (expected or unchanged)


def test_a_preprocessor_that_crops_is_refused(tmp_path):
    path = write(tmp_path, do_center_crop=True, crop_size={"height": 2, "width": 3})
    message = (
        f"{path}: do_center_crop is true, but images are not cropped here\n"
        "hint: store model inputs (pixel_values) in an .npz"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        ImagePreprocessor.load(tmp_path)


def test_channels_have_their_own_mean_and_come_before_the_pixels():
    preprocessor = ImagePreprocessor(1, 2, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    images = np.array([[[[0, 0, 0], [255, 255, 255]]]], np.uint8)
    pixels = preprocessor(images, "here")
    assert pixels.shape == (1, 3, 1, 2)
    np.testing.assert_allclose(pixels[0, :, 0], [[0, 1], [-1, 1], [-4, 0]])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"size": None}, "key 'size' is missing"),
        ({"size": {"height": 4}}, "size: key 'width' is missing"),
        ({"size": {"height": 4, "width": "6"}}, "size: key 'width' holds '6', expected int"),
        ({"image_mean": None}, "key 'image_mean' is missing"),
        ({"image_mean": ["0.5"]}, "key 'image_mean' holds '0.5', expected float"),
        ({"image_std": [0.5, 0.5]}, "image_mean [0.5] and image_std [0.5, 0.5] are not those of 1 or 3 channels"),
        ({"image_std": [0]}, "image_mean [0.5] and image_std [0.0] are not those of 1 or 3 channels"),
    ],
)
def test_what_is_no_image_preprocessor_is_refused(changes, what, tmp_path):
    path = write(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        ImagePreprocessor.load(tmp_path)
    assert caught.value.what == f"{path}: {what}"
    assert caught.value.hint == "export the model again with its preprocessor_config.json"
