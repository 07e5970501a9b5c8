import re

import numpy as np
import PIL.Image
import pytest

from moe_spec.errors import UserError
from moe_spec.images import ImagePreprocessor
from runtime.inputs.image_files import read_image, read_images

GREY = ImagePreprocessor(4, 6, mean=(0.5,), std=(0.5,))
RGB = ImagePreprocessor(4, 6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def image(mode="RGB", size=(6, 4), colour=255):
    return PIL.Image.new(mode, size, colour)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG"])
def test_an_image_is_given_the_models_size_and_channels(tmp_path, name):
    image(size=(60, 40), colour=(255, 255, 255)).save(tmp_path / name)
    assert read_image(tmp_path / name, GREY).shape == (4, 6)
    assert read_image(tmp_path / name, RGB).shape == (4, 6, 3)
    np.testing.assert_array_equal(read_image(tmp_path / name, GREY), 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA"])
def test_other_kinds_of_png_are_converted(tmp_path, mode):
    image(mode, colour=0).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", RGB).shape == (4, 6, 3)


def test_pixels_of_an_image_of_the_right_size_are_kept(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", GREY), pixels)
    feeds = read_images([tmp_path / "a.png"] * 2, GREY)
    np.testing.assert_allclose(feeds["pixel_values"][1, 0], (pixels / 255 - 0.5) / 0.5, rtol=1e-6)


def test_a_turned_photograph_is_turned_back(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    turned = PIL.Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    turned.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", GREY), pixels)


def refused(path, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        read_image(path, GREY)


def test_a_missing_image_is_named(tmp_path):
    refused(
        tmp_path / "a.png",
        re.escape(f"{tmp_path}/a.png does not exist, expected an image (PNG or JPEG)\nhint: check the path"),
    )


def test_a_cut_image_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    refused(
        tmp_path / "a.png",
        re.escape(f"{tmp_path}/a.png is no readable PNG or JPEG: ") + ".*" + re.escape("\nhint: save the image again"),
    )


def test_a_file_of_another_format_is_not_opened(tmp_path):
    image().save(tmp_path / "a.png", format="BMP")
    refused(
        tmp_path / "a.png",
        re.escape(f"{tmp_path}/a.png is no readable PNG or JPEG: cannot identify image file ")
        + ".*\n"
        + "hint: save the image again",
    )


@pytest.mark.parametrize("limit", [10, 20])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    """Pillow warns above its limit and refuses above twice that; both are refused here, before anything is unpacked."""
    image().save(tmp_path / "a.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    refused(
        tmp_path / "a.png",
        re.escape(f"{tmp_path}/a.png is too large an image: Image size (24 pixels) exceeds limit of 20 pixels")
        + ".*\nhint: make it smaller",
    )


def test_deep_colours_are_not_clipped_silently(tmp_path):
    PIL.Image.fromarray(np.full((4, 6), 40_000, np.uint16)).save(tmp_path / "a.png")
    refused(
        tmp_path / "a.png",
        re.escape(f"{tmp_path}/a.png has more than 8 bits a channel\nhint: save it with 8 bits a channel"),
    )
