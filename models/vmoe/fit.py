"""How the embedded model is trained: AdamW, warm-up and cosine, label smoothing, light augmentation."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.vmoe.augment import flip_and_shift
from models.vmoe.modeling import VMoeForImageClassification

NO_DECAY = ("bias", "layernorm", "position_embeddings")
"""Parameters with one of these in their name are not decayed."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the result depends on, beside the data and the code."""

    seed: int = 0
    epochs: int = 36
    batch_size: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 2
    label_smoothing: float = 0.1
    max_shift: int = 1


def fit(
    model: VMoeForImageClassification,
    pixel_values: Tensor,
    labels: Tensor,
    recipe: Recipe,
    report: Callable[[str], None],
) -> None:
    """Train ``model`` in place.

    Args:
        model: initialised.
        pixel_values: (N, C, S, S) float.
        labels: (N,) int64.
        recipe: seed of shuffling and augmentation, and hyper-parameters. Router noise uses torch's global generator.
        report: told one line an epoch.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    black = pixel_values.min().item()
    steps = -(-len(labels) // recipe.batch_size)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, recipe.warmup_epochs * steps, recipe.epochs * steps)
    )
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        losses = []
        for ids in torch.split(torch.randperm(len(labels), generator=generator), recipe.batch_size):
            images = flip_and_shift(pixel_values[ids], recipe.max_shift, black, generator)
            loss = training_loss(model, images, labels[ids], recipe.label_smoothing)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        report(f"epoch {epoch}/{recipe.epochs}: loss {sum(losses) / len(losses):.4f}")


def training_loss(
    model: VMoeForImageClassification, pixel_values: Tensor, labels: Tensor, label_smoothing: float
) -> Tensor:
    """The model's own training loss, with label smoothing in its cross-entropy."""
    output = model(pixel_values)
    entropy = functional.cross_entropy(output.logits, labels, label_smoothing=label_smoothing)
    total: Tensor = entropy + model.config.router_aux_loss_coef * output.aux_loss
    return total


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: what is multiplied is decayed; biases, LayerNorms and positions are not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (kept if any(part in name for part in NO_DECAY) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate: linear up to 1 in ``warmup`` steps, then half a cosine down to 0 at ``total``.

    >>> [round(warmup_cosine(step, 2, 10), 2) for step in (0, 1, 2, 6, 10)]
    [0.33, 0.67, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
