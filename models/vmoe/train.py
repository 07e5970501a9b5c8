"""The recipe of the embedded model: ``python -m models.vmoe.train --data DIR -o DIR``.

``--data`` is a directory with the four gzipped idx files of Fashion-MNIST. The result depends on the seed, on the
machine's arithmetic and on the versions noted in recipe.json, nothing else: training runs on one thread.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from models.vmoe.configuration import VMoeConfig
from models.vmoe.fit import Recipe, fit
from models.vmoe.idx import CLASSES, load_split
from models.vmoe.modeling import VMoeForImageClassification
from models.vmoe.package import balanced_cut, dataset_sha256, tensors, write_package
from moe_spec.errors import UserError
from moe_spec.files import new_directory
from moe_spec.record import Json


def train(
    data: Path,
    output: Path,
    recipe: Recipe,
    examples_shipped: int = 1000,
    report: Callable[[str], None] = lambda _line: None,
) -> Json:
    """Train a V-MoE on Fashion-MNIST and write the asset directory ``output``.

    Args:
        data: directory with the four gzipped idx files.
        output: directory to write; must not exist.
        recipe: seed and hyper-parameters.
        examples_shipped: length of calibration.npz and of test.npz.
        report: told one line an epoch.

    Returns:
        What recipe.json holds.

    Raises:
        UserError: the data is not in Fashion-MNIST's layout, a class is too small, or ``output`` exists.
    """
    with new_directory(output) as staging:
        splits = {name: load_split(data, name) for name in ("train", "t10k")}
        cuts = {name: balanced_cut(split, examples_shipped, recipe.seed) for name, split in splits.items()}
        torch.manual_seed(recipe.seed)
        model = VMoeForImageClassification(
            VMoeConfig(id2label=dict(enumerate(CLASSES)), label2id={name: label for label, name in enumerate(CLASSES)})
        )
        start = time.monotonic()
        fit(model, *tensors(splits["train"]), recipe, report)
        facts = {
            **dataclasses.asdict(recipe),
            "dataset_sha256": dataset_sha256(data),
            "threads": torch.get_num_threads(),
            "training_seconds": round(time.monotonic() - start, 1),
        }
        return write_package(staging, model, splits, cuts, facts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 done, 1 the user can mend it."""
    parser = argparse.ArgumentParser(prog="python -m models.vmoe.train", description="Train the embedded V-MoE.")
    parser.add_argument("--data", type=Path, required=True, help="directory with Fashion-MNIST's four .gz files")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory to write; it must not exist yet")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="passes over the training split")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of everything random")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = Recipe(epochs=options.epochs, seed=options.seed)
    try:
        written = train(options.data, options.output, recipe, report=_print)
    except UserError as failure:
        sys.stderr.write(f"error: {failure}\n")
        return 1
    _print(f"accuracy: {written['accuracy']}")
    return 0


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
