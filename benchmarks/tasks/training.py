"""What the tasks' own training has in common, whatever is trained on what."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

MAX_GRADIENT = 1.0
"""Longer gradients, all of them together, are scaled to it."""

Report = Callable[[str], None]
"""Told a line now and then."""


def endless(count: int, generator: np.random.Generator) -> Iterator[int]:
    """Numbers below ``count`` in random order, again and again."""
    while True:
        yield from generator.permutation(count)


def descend(
    loss: Tensor,
    learned: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One step down the gradient of ``loss``, clipped over all that is ``learned``."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(learned, MAX_GRADIENT)
    optimizer.step()
    schedule.step()
