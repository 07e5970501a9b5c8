"""Images to model input, as a transformers ``preprocessor_config.json`` says. numpy only: it runs on the device."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError
from moe_spec.record import Record, parse_object

FILE_NAME = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """``pixel_values = (image * rescale_factor - mean) / std``, one mean and std a channel."""

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255

    @property
    def channels(self) -> int:
        """Colour channels that the model expects: 1 or 3."""
        return len(self.mean)

    @classmethod
    def load(cls, model: Path) -> "ImagePreprocessor | None":
        """The preprocessor of a model, a directory or a file in it; None where there is none.

        Raises:
            UserError: the file is there but is no image preprocessor, or one that crops.
        """
        path = (model if model.is_dir() else model.parent) / FILE_NAME
        if not path.is_file():
            return None
        remake = "export the model again with its preprocessor_config.json"
        record = Record(parse_object(path, path.read_bytes(), remake), str(path), remake)
        size = record.required("size")
        mean, std = record.items("image_mean", float), record.items("image_std", float)
        if len(mean) not in (1, 3) or len(std) != len(mean) or 0 in std:
            raise record.fail(f"image_mean {list(mean)} and image_std {list(std)} are not those of 1 or 3 channels")
        if record.take("do_center_crop", bool, default=None):
            raise UserError(
                f"{path}: do_center_crop is true, but images are not cropped here",
                hint="store model inputs (pixel_values) in an .npz",
            )
        if record.take("do_normalize", bool, default=None) is False:
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
        is_rescaled = record.take("do_rescale", bool, default=None) is not False
        return cls(
            height=size.take("height", int),
            width=size.take("width", int),
            mean=mean,
            std=std,
            rescale_factor=record.take("rescale_factor", float, default=cls.rescale_factor) if is_rescaled else 1.0,
        )

    def __call__(self, images: npt.NDArray[Any], where: str) -> npt.NDArray[np.float32]:
        """``pixel_values`` (N, C, H, W) float32 of ``images``, uint8 (N, H, W) or (N, H, W, C).

        Raises:
            UserError: the images are of another size, dtype or number of channels; ``where`` names their file.
        """
        stacked = images[..., np.newaxis] if images.ndim == 3 else images
        expected = (self.height, self.width, self.channels)
        if images.dtype != np.uint8 or stacked.shape[1:] != expected:
            channels = "" if self.channels == 1 else f", {self.channels}"
            raise UserError(
                f"{where}: images are {images.dtype}{list(images.shape)}, "
                f"expected uint8 [N, {self.height}, {self.width}{channels}]",
                hint="store the images at the model's size, or give image files, which are resized",
            )
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (stacked.astype(np.float32) * np.float32(self.rescale_factor) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), dtype=np.float32)
