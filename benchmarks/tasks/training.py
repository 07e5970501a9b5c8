"""What the tasks' own training has in common, whatever is trained on what."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models.vmoe.fit import warmup_cosine

MAX_GRADIENT = 1.0
"""Longer gradients, all of them together, are scaled to it."""

REPORT_EVERY = 25
WARMUP = 0.1
"""The part of the steps in which the learning rate rises."""

Report = Callable[[str], None]
"""Told a line now and then."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """How something is trained, by AdamW.

    Attributes:
        steps: of it.
        batch_size: examples a step.
        learning_rate: at its highest; then half a cosine down to 0.
        balance: weight of every MoE layer's load-balancing loss.
        guide: weight of every router's cross-entropy between its probabilities for a token and the expert of the
            token's domain, so that routers start to use what experts have learned.
    """

    steps: int
    batch_size: int
    learning_rate: float
    balance: float = 0.0
    guide: float = 0.0


def bfloat16() -> torch.autocast:
    """Matrix products are in bfloat16, which recent processors multiply several times as fast."""
    return torch.autocast("cpu", torch.bfloat16)


def train(
    model: nn.Module,
    learned: Sequence[nn.Parameter],
    losses: Callable[[], tuple[Tensor, Tensor]],
    phase: Phase,
    report: Report,
) -> None:
    """Train ``learned``, parameters of ``model``, in place; gradients reach nothing else. In eval mode afterwards.

    Args:
        model: in training mode meanwhile.
        learned: what is trained.
        losses: of the next batch: the one that is descended, and the one that is told of.
        phase: for how long.
        report: told how it goes.
    """
    model.requires_grad_(False)
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learned, lr=phase.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, int(WARMUP * phase.steps), phase.steps)
    )
    model.train()
    told = []
    for step in range(1, phase.steps + 1):
        loss, entropy = losses()
        descend(loss, learned, optimizer, schedule)
        told.append(entropy.item())
        if step % REPORT_EVERY == 0 or step == phase.steps:
            report(f"step {step}/{phase.steps}: loss {np.mean(told[-REPORT_EVERY:]):.3f}")
    model.requires_grad_(True)
    model.train(False)


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
