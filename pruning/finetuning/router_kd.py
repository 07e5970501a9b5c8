"""Routers learn what became of their experts: https://arxiv.org/abs/2603.02217."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.moe_layers import find_moe_layers
from moe_spec.dataset import MASK
from moe_spec.errors import UserError
from moe_spec.progress import Progress, silent
from pruning.finetuning.examples import Inputs, is_language_model
from pruning.finetuning.objectives import distance
from pruning.finetuning.recipe import Recipe
from pruning.finetuning.training import train


def distil(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    examples: Inputs,
    temperature: float,
    recipe: Recipe,
    on_progress: Progress = silent,
) -> list[float]:
    """Train the routers of ``model`` in place to give what ``teacher`` gives; nothing else changes.

    A router whose weight for the one selected expert is always 1 (K=1, renormalised) learns nothing, for want of a
    gradient.

    Args:
        model: pruned.
        teacher: the full model, in eval mode.
        examples: inputs without labels.
        temperature: see `RouterKD`.
        recipe: optimizer, schedule and seed.
        on_progress: told after every step.

    Returns:
        The loss of every step.

    Raises:
        UserError: the models give logits of different widths, or no router has a choice.
    """
    check_teacher(model, teacher)
    language = is_language_model(model)

    def objective(student: nn.Module, batch: Inputs) -> Tensor:
        logits = student(**batch).logits
        with torch.no_grad():
            target = teacher.to(logits.device)(**batch).logits
        if language:
            mask_BS = batch.get(MASK)
            real_BS = torch.ones(logits.shape[:2], dtype=torch.bool) if mask_BS is None else mask_BS != 0
            logits, target = logits[real_BS], target[real_BS]
        return distance(target, logits, temperature)

    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    for layer in find_moe_layers(model):
        for parameter in layer.router.parameters():
            parameter.requires_grad_(True)
    try:
        return train(model, examples, objective, recipe, on_progress=on_progress)
    finally:
        for parameter, learns in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(learns)


def check_teacher(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher whose routers ``model`` cannot learn from; weights are not looked at.

    Raises:
        UserError: the models give logits of different widths, or no router has a choice.
    """
    widths = [_width(one) for one in (model, teacher)]
    if widths[0] != widths[1]:
        raise UserError(
            f"the model gives {widths[0]} logits, its teacher {widths[1]}",
            hint="give the checkpoint that the model was pruned from as --teacher",
        )
    if all(layer.num_experts == 1 for layer in find_moe_layers(model)):
        raise UserError(
            "every layer has one expert, so the routers have nothing to choose", hint="recover with --method plain"
        )


def _width(model: PreTrainedModel) -> int:
    config: Any = model.config
    width: int = config.get_text_config().vocab_size if is_language_model(model) else config.num_labels
    return width
