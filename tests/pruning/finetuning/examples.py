"""Little tasks that tiny models can learn."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from models.checkpoints import save_model
from pruning.finetuning.examples import is_language_model, next_tokens
from pruning.finetuning.recipe import Recipe
from tests.models_table import TINY, example_inputs

Columns = dict[str, torch.Tensor]


def quick(steps: int, **changes: object) -> Recipe:
    """AdamW without warm-up."""
    options = {"learning_rate": 3e-3, "final_learning_rate": 3e-3, "warmup": 0.0, "batch_size": 8, "max_grad_norm": 1.0}
    return Recipe("adamw", steps=steps, **options | changes)  # type: ignore[arg-type]


def columns(model: PreTrainedModel, count: int = 32) -> Columns:
    """Random inputs; classes by a few pixels or tokens, next tokens for a language model."""
    batch = example_inputs(model, count, 6, seed=0)
    if is_language_model(model):
        return {**batch, "labels": next_tokens(batch["input_ids"], batch["attention_mask"])}
    large = batch["pixel_values"][:, 0, ::4, 0] > 0 if "pixel_values" in batch else batch["input_ids"][:, :3] > 63
    return {**batch, "labels": large.long() @ torch.tensor([4, 2, 1])}


def saved(name: str, directory: Path) -> tuple[Path, Path]:
    """A checkpoint of the tiny model ``name``, and its task as .npz."""
    model, checkpoint, data = TINY[name](), directory / name, directory / "train.npz"
    save_model(model, checkpoint)
    arrays: dict[str, Any] = {key: column.numpy() for key, column in columns(model).items()}
    if is_language_model(model):
        del arrays["labels"]
    np.savez_compressed(data, **arrays)
    return checkpoint, data
