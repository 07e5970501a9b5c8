"""Light augmentation of a batch of images, in torch."""

import torch
from torch import Tensor
from torch.nn import functional


def flip_and_shift(images_BCHW: Tensor, max_shift: int, fill: float, generator: torch.Generator) -> Tensor:
    """Mirror every second image or so, and move each by up to ``max_shift`` pixels along both axes.

    Args:
        images_BCHW: (B, C, height, width) float.
        max_shift: pixels.
        fill: value of what is uncovered.
        generator: source of randomness.
    """
    batch, _, height, width = images_BCHW.shape
    mirrored_B = torch.rand(batch, generator=generator) < 0.5
    images_BCHW = torch.where(mirrored_B[:, None, None, None], images_BCHW.flip(-1), images_BCHW)
    padded = functional.pad(images_BCHW, (max_shift,) * 4, value=fill)
    top_B, left_B = torch.randint(0, 2 * max_shift + 1, (2, batch), generator=generator)
    rows = top_B[:, None, None] + torch.arange(height)[None, :, None]
    columns = left_B[:, None, None] + torch.arange(width)[None, None, :]
    return padded[torch.arange(batch)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
