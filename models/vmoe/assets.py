"""Where the embedded model lies. Needs no torch."""

import importlib.resources
from pathlib import Path


def fashion_mnist() -> Path:
    """The trained V-MoE with its images: a checkpoint directory with calibration.npz, test.npz and recipe.json.

    >>> (fashion_mnist() / "model.safetensors").is_file()
    True
    """
    return Path(str(importlib.resources.files("models.vmoe"))) / "fashion_mnist"
