"""Accuracy of the embedded model by criterion and experts kept, without fine-tuning.

Example: python -m benchmarks.criteria > benchmarks/criteria.md
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from benchmarks.tasks import metrics
from models.checkpoints import load_model
from models.vmoe.assets import fashion_mnist
from moe_spec.dataset import Dataset, load_dataset
from moe_spec.layer_plan import ROWS
from pruning.apply import apply_plan
from pruning.calibrate import calibrate
from pruning.criteria import CRITERIA, WEIGHT_CRITERIA
from pruning.options import PlanOptions
from pruning.plan import make_plan
from runtime.measuring.machine import describe_machine

KEEPS = (6, 4, 3, 2, 1)
SEEDS = range(5)


def accuracy(data: Dataset, source: Path | None = None, options: PlanOptions | None = None) -> float:
    """Share of ``data`` that the model classifies right, pruned by what ``source`` tells where there is one."""
    model = load_model(fashion_mnist())
    if source is not None and options is not None:
        apply_plan(model, make_plan(source, options))
    return metrics.accuracy(model, data)


def measure(statistics: Path, data: Dataset) -> Mapping[str, list[str]]:
    """A cell for each of ``KEEPS``, by criterion."""

    def run(keep: int, criterion: str, seed: int = 0) -> float:
        source = fashion_mnist() if criterion in WEIGHT_CRITERIA else statistics
        return accuracy(data, source, PlanOptions(keep, criterion, seed=seed, clamp_top_k=True, router=ROWS))

    names = [*CRITERIA, *WEIGHT_CRITERIA]
    cells = {criterion: [f"{run(keep, criterion):.1%}" for keep in KEEPS] for criterion in names}
    cells["random"] = []
    for keep in KEEPS:
        runs = [run(keep, "random", seed) for seed in SEEDS]
        cells["random"].append(f"{np.mean(runs):.1%} ({min(runs):.1%} to {max(runs):.1%})")
    return cells


def main() -> None:
    """Print the table as Markdown."""
    torch.set_num_threads(1)
    checkpoint = fashion_mnist()
    data = load_dataset(checkpoint / "test.npz", checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        statistics = Path(scratch) / "statistics.safetensors"
        calibrate(checkpoint, checkpoint / "calibration.npz", statistics)
        cells = measure(statistics, data)
    print("# Criteria on the embedded model\n")
    print(f"`python -m benchmarks.criteria` printed this on {describe_machine()}.\n")
    print(f"V-MoE on Fashion-MNIST, 8 experts a layer, K=2, {len(data):,} test images; calibrated on training images,")
    print(
        "pruned in one shot, the same number in both layers, not fine-tuned. `aimer` and `random` see no data; `random`"
    )
    print(f"is the mean of five seeds, with its range. Unpruned: {accuracy(data):.1%}.\n")
    print("| criterion | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " |")
    print("|---|" + "---:|" * len(KEEPS))
    for criterion, row in cells.items():
        print(f"| {criterion} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
