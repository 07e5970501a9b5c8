"""Train branches of SmolLM2 on a novel, on speeches and on code, and the routers of the Mixtral of them all."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.tasks.smollm import QUICK, Recipe, prepare


def report(line: str) -> None:
    """To stderr."""
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two steps on two of 30 layers, which say nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = prepare(QUICK if options.quick else Recipe(), report)
    for name, path in (*models.branches.items(), ("moe", models.moe), ("text", models.data)):
        Path(name).symlink_to(path)
