"""PNG and JPEG files to what a model takes."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from moe_spec.errors import UserError
from moe_spec.files import require_file
from moe_spec.images import ImagePreprocessor

SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")  # Pillow knows many more, and each is a way in for a hostile file
_MODES = {1: "L", 3: "RGB"}
_DEEP = ("I", "F")  # 16 bits a channel and more; Pillow would clip them


def find_images(directory: Path) -> list[Path]:
    """The PNG and JPEG files in ``directory`` and in its folders, sorted; hidden ones and those in hidden folders not.

    Raises:
        UserError: there is none.
    """
    names = (path.relative_to(directory) for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES)
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    found = sorted(path for path in map(directory.joinpath, visible) if path.is_file())
    if not found:
        raise UserError(f"{directory} has no image ({', '.join(SUFFIXES)})", hint="give a folder of PNG or JPEG files")
    return found


def read_image(path: Path, preprocessor: ImagePreprocessor) -> npt.NDArray[np.uint8]:
    """An image (H, W) or (H, W, 3) uint8 in the model's size and channels, turned as its EXIF orientation says.

    Raises:
        UserError: the file is missing, no PNG or JPEG, broken, or far larger than any photograph.
    """
    require_file(path, "an image (PNG or JPEG)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path, formats=_FORMATS) as file:
                if file.mode.startswith(_DEEP):
                    raise UserError(f"{path} has more than 8 bits a channel", hint="save it with 8 bits a channel")
                image = PIL.ImageOps.exif_transpose(file).convert(_MODES[preprocessor.channels])
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as bomb:
        raise UserError(f"{path} is too large an image: {bomb}", hint="make it smaller") from bomb
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is no readable PNG or JPEG: {error}", hint="save the image again") from error
    size = (preprocessor.width, preprocessor.height)
    return np.asarray(image.resize(size, PIL.Image.Resampling.BILINEAR), dtype=np.uint8)


def read_images(paths: list[Path], preprocessor: ImagePreprocessor) -> dict[str, npt.NDArray[Any]]:
    """``pixel_values`` (N, C, H, W) float32 of N image files.

    Raises:
        UserError: one of them cannot be read.
    """
    images = np.stack([read_image(path, preprocessor) for path in paths])
    return {"pixel_values": preprocessor(images, "the images")}
