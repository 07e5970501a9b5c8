"""The asset directory of a trained model: checkpoint, preprocessor, cuts of the data, recipe.json, model card."""

import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

from models.vmoe.card import model_card
from models.vmoe.evaluate import evaluate
from models.vmoe.idx import CLASSES, FILES, Split
from models.vmoe.modeling import VMoeForImageClassification
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.images import FILE_NAME as PREPROCESSOR_FILE
from moe_spec.images import ImagePreprocessor
from moe_spec.record import Json, dump

PREPROCESSOR = ImagePreprocessor(height=28, width=28, mean=(0.286,), std=(0.353,))
"""Mean and standard deviation of the training pixels, rounded."""


def tensors(split: Split) -> tuple[Tensor, Tensor]:
    """Model input (N, 1, 28, 28) float32 and labels (N,) int64."""
    pixel_values = PREPROCESSOR(split.images, "Fashion-MNIST")
    return torch.from_numpy(pixel_values), torch.from_numpy(split.labels.astype(np.int64))


def balanced_cut(split: Split, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Ids (count,) of examples drawn without replacement, the same number of every class, in random order.

    Raises:
        UserError: a class has too few examples.
    """
    generator = np.random.default_rng(seed)
    each = count // len(CLASSES)
    chosen = []
    for label, name in enumerate(CLASSES):
        ids = np.flatnonzero(split.labels == label)
        if len(ids) < each:
            raise UserError(
                f"class {label} ({name}) has {len(ids)} examples, expected at least {each}",
                hint="give the whole Fashion-MNIST, or ship fewer examples",
            )
        chosen.append(generator.choice(ids, each, replace=False))
    return generator.permutation(np.concatenate(chosen))


def write_package(
    directory: Path,
    model: VMoeForImageClassification,
    splits: Mapping[str, Split],
    cuts: Mapping[str, npt.NDArray[np.int64]],
    facts: Json,
) -> Json:
    """Write everything into ``directory``, which exists; returns what recipe.json holds.

    Args:
        directory: where to.
        model: trained.
        splits: ``train`` and ``t10k``.
        cuts: ids of the examples to ship from each split.
        facts: what recipe.json shall hold beside what is measured here.
    """
    model.save_pretrained(directory)
    _write_json(directory / PREPROCESSOR_FILE, _preprocessor_json())
    for name, file_name in (("train", "calibration.npz"), ("t10k", "test.npz")):
        ids = cuts[name]
        np.savez_compressed(directory / file_name, images=splits[name].images[ids], labels=splits[name].labels[ids])
    test = evaluate(model, *tensors(splits["t10k"]))
    shipped = test.correct[torch.from_numpy(cuts["t10k"])].double().mean().item()
    recipe = facts | {
        "accuracy": {"official_test_split": round(test.accuracy, 6), "test.npz": round(shipped, 6)},
        "expert_load": {name: [round(share, 4) for share in load] for name, load in test.expert_load.items()},
        "examples": {"official_test_split": len(test.correct), "test.npz": len(cuts["t10k"])},
        "parameters": model.num_parameters(),
        "versions": {
            "numpy": np.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    _write_json(directory / "recipe.json", recipe)
    (directory / "README.md").write_text(model_card(recipe), encoding="utf-8")
    return recipe


def dataset_sha256(data: Path) -> dict[str, str]:
    """Hash of each of the four files in ``data``."""
    return {name: sha256_file(data / name) for name in FILES}


def _preprocessor_json() -> Json:
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(PREPROCESSOR.mean),
        "image_processor_type": "ViTImageProcessor",
        "image_std": list(PREPROCESSOR.std),
        "resample": 2,
        "rescale_factor": PREPROCESSOR.rescale_factor,
        "size": {"height": PREPROCESSOR.height, "width": PREPROCESSOR.width},
    }


def _write_json(path: Path, content: Json) -> None:
    path.write_text(dump(content) + "\n", encoding="utf-8")
