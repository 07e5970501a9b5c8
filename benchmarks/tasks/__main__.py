"""What the tasks are: sizes, scores before pruning, and how far experts specialise where several tasks share a model.

    python -m benchmarks.tasks > benchmarks/tasks/README.md

The first time it fetches the data and trains the models, minutes each; ``MOE_EDGE_CACHE`` says where they are kept.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.markdown import table
from benchmarks.tasks import TASKS
from benchmarks.tasks.sources import PACKAGES
from benchmarks.tasks.specialise import document, measure_usage
from benchmarks.tasks.task import Task
from models.checkpoints import load_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from runtime.measuring.machine import describe_machine

HEAD = ("task", "model", "MoE layers", "parameters", "calibration", "fine-tuning", "test", "before pruning", "trained")


@dataclasses.dataclass(frozen=True)
class Row:
    """A task, its model before pruning, and what it scores."""

    task: Task
    model: PreTrainedModel
    score: float


def measure(names: Sequence[str], seed: int) -> list[Row]:
    """Make the tasks and judge their models; progress goes to stderr."""
    rows = []
    for name in names:
        print(name, file=sys.stderr)
        task = TASKS[name](seed, lambda line: print(line, file=sys.stderr))
        model = load_model(task.checkpoint)
        rows.append(Row(task, model, task.evaluate(model)))
    return rows


def report(rows: Sequence[Row], seed: int, command: str) -> str:
    """The whole document."""
    packages = ((package.name, package.version, package.manager, package.licence) for package in PACKAGES)
    usage = "".join(f"{text}\n" for text in _specialisation(rows))
    return f"""# Tasks

`{command}` printed this on {describe_machine()}; one thread, seed {seed}.

{table(HEAD, (_cells(row) for row in rows), left=3)}

Calibration, fine-tuning and test are numbers of examples; calibration examples are out of the training data, test
examples are out of documents or images that no model was trained with. Training took one thread; where it is done
here, its time is that of the processor, the embedded model's is the clock's.

{usage}
What is fetched for them, with the package managers that the machine has; nothing of it is installed:

{table(("package", "version", "fetched by", "licence"), packages, left=4)}"""


def _cells(row: Row) -> list[str]:
    task, layers = row.task, find_moe_layers(row.model)
    (kind,) = {f"{len(layers)} x {layer.num_experts} experts, K={layer.top_k}" for layer in layers}
    return [
        task.name,
        row.model.config.model_type,
        kind,
        f"{row.model.num_parameters():,}",
        *(f"{len(task.read(path)):,}" for path in (task.calibration, task.finetune, task.test)),
        f"{row.score:{task.metric.spec}} {task.metric.unit}",
        f"{task.training_seconds:.0f} s",
    ]


def _specialisation(measured: Sequence[Row]) -> list[str]:
    """How differently tasks use the experts of a model that they share."""
    groups: dict[Path, list[Row]] = {}
    for row in measured:
        groups.setdefault(row.task.checkpoint, []).append(row)
    shared = (rows for rows in groups.values() if len(rows) > 1)
    return [
        document(rows[0].model, {row.task.name: measure_usage(row.model, row.task.read(row.task.test)) for row in rows})
        for rows in shared
    ]


def main() -> None:
    """Measure and print the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="only this one; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.task or list(TASKS)
    command = " ".join(("python -m benchmarks.tasks", *(f"--task {name}" for name in options.task or ())))
    try:
        print(report(measure(names, options.seed), options.seed, f"{command} --seed {options.seed}"))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
