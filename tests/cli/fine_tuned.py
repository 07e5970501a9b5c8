"""A model before and after fine-tuning that made some router rows longer: what `router-norm` plans by."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from models.checkpoints import save_model
from models.moe_layers import find_moe_layers
from tests.models_table import example_inputs


def save_fine_tuned(model: PreTrainedModel, grown: Mapping[str, Sequence[int]], directory: Path) -> tuple[object, ...]:
    """Write base, tuned (in which the rows ``grown`` of each layer are longer) and task.npz; how `plan` keeps 3."""
    save_model(model, directory / "base")
    with torch.no_grad():
        for layer in find_moe_layers(model):
            layer.router.get_parameter("weight")[list(grown[layer.name])] *= 1.5
    save_model(model, directory / "tuned")
    images = example_inputs(model, 24, 0, seed=3)["pixel_values"].numpy()
    np.savez(directory / "task.npz", pixel_values=images, labels=np.arange(24) % 10)
    return ("--criterion", "router-norm", "--pretrained", directory / "base", "--keep", 3)
