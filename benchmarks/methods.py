"""What is left of a model when a share of its experts goes, by every method that chooses them; nothing is trained.

    python -m benchmarks.methods --seeds 3 > benchmarks/methods.md

Each cell is one model, pruned in memory by the plan that ``moe-edge plan`` makes, on the task's held-out test data.
Cells are kept in the cache of ``benchmarks.tasks`` and not measured again; a run that was cut goes on. With ``--task``
and ``--method`` only a part is measured.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.machine import describe_machine
from benchmarks.markdown import table
from benchmarks.tasks import TASKS
from benchmarks.tasks.cache import RECIPE, cached
from benchmarks.tasks.task import Task
from models.checkpoints import load_model
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.plan import MEAN, NEW, PruningPlan
from moe_spec.record import Json, Record, parse_object
from pruning.apply import apply_plan
from pruning.budget import Keep
from pruning.calibrate import calibrate
from pruning.criteria import CRITERIA
from pruning.merging.mergers import MERGERS
from pruning.plan import PlanOptions, make_plan
from pruning.plan_on_data import DataOptions, plan_on_data

VERSION = 1
"""Raised when the code here makes another number of the same task, method and share."""

SHARES: Mapping[str, Keep] = {"25 %": 0.75, "50 %": 0.5, "75 %": 0.25, "all but one": 1}
"""What is dropped of every layer's experts, and what is kept."""

RANDOM_DRAWS = 5
ROUNDS = 4
STATISTICS = "statistics.safetensors"
UNPRUNED = "before pruning"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A task's model and the statistics of its calibration data."""

    task: Task
    statistics: Path


Method = Callable[[Subject, Keep, int], PruningPlan]
"""Makes a plan; the last argument is a seed, which only ``random`` looks at."""


def by_criterion(name: str, router: str = "") -> Method:
    """Rank or merge once, by the criterion ``name``."""
    return lambda subject, keep, seed: make_plan(
        subject.statistics, PlanOptions(keep, name, seed=seed, clamp_top_k=True, router=router)
    )


def aimer(subject: Subject, keep: Keep, _seed: int) -> PruningPlan:
    """Rank by the experts' weights alone."""
    return make_plan(subject.task.checkpoint, PlanOptions(keep, "aimer", clamp_top_k=True))


def in_rounds(subject: Subject, keep: Keep, _seed: int) -> PruningPlan:
    """REAP in rounds of pruning and looking again."""
    return _on_data(subject, PlanOptions(keep, "reap", clamp_top_k=True), DataOptions(rounds=ROUNDS))


def naee(subject: Subject, keep: Keep, _seed: int) -> PruningPlan:
    """Search for the experts whose absence changes a layer least."""
    return _on_data(subject, PlanOptions(keep, "naee"), DataOptions())


def _on_data(subject: Subject, options: PlanOptions, how: DataOptions) -> PruningPlan:
    with tempfile.TemporaryDirectory() as scratch:
        return plan_on_data(
            subject.task.checkpoint, subject.task.calibration, options, Path(scratch) / "plan.json", how
        )


METHODS: Mapping[str, Method] = {
    **{name: by_criterion(name) for name in ("random", *CRITERIA)},
    **{name: by_criterion(name, MEAN if row.router == NEW else row.router) for name, row in MERGERS.items()},
    "aimer": aimer,
    f"reap, {ROUNDS} rounds": in_rounds,
    "naee": naee,
}
"""Every way to choose. A router that would have to be trained anew is the mean of the merged rows instead."""


def measure(task: Task, method: str, share: str) -> float | None:
    """The task's metric of the pruned model; the mean of several draws for ``random``; None where it cannot be done."""
    subject = Subject(task, statistics_of(task))
    draws = range(RANDOM_DRAWS if method == "random" else 1)
    try:
        plans = [METHODS[method](subject, SHARES[share], seed) for seed in draws]
    except UserError:  # refused: fewer than K experts
        return None
    return statistics.mean(evaluate(task, plan) for plan in plans)


def evaluate(task: Task, plan: PruningPlan | None) -> float:
    """The metric of the task's model, pruned by ``plan``."""
    model = load_model(task.checkpoint)
    if plan is not None:
        apply_plan(model, plan)
    return task.evaluate(model)


def statistics_of(task: Task) -> Path:
    """The statistics of the calibration data, dense ones too; taken once."""

    def make(directory: Path) -> Json:
        calibrate(task.checkpoint, task.calibration, directory / STATISTICS, dense=True)
        return {}

    return cached(f"statistics-{task.name}", _recipe(task), make) / STATISTICS


def cell(task: Task, method: str, share: str) -> float | None:
    """`measure`, or what an earlier run measured; of the model as it is where ``method`` is `UNPRUNED`."""

    def make(_directory: Path) -> Json:
        return {"value": evaluate(task, None) if method == UNPRUNED else measure(task, method, share)}

    path = cached(f"cell-{task.name}", _recipe(task) | {"method": method, "share": share}, make) / RECIPE
    remake = f"remove {path.parent}; it is measured again"
    return Record(parse_object(path, path.read_bytes(), remake), str(path), remake).take("value", float, default=None)


def _recipe(task: Task) -> Json:
    return {"task": task.name, "model": checkpoint_sha256(task.checkpoint), "version": VERSION}


def measure_task(name: str, methods: Sequence[str], seeds: int) -> str:
    """The table of one task: methods down, shares across; progress goes to stderr."""
    tasks = _seeds_of(name, seeds)
    rows = [(UNPRUNED, *[_shown(tasks, [cell(task, UNPRUNED, "") for task in tasks])] * len(SHARES))]
    for method in methods:
        print(f"{name}: {method}", file=sys.stderr, flush=True)
        values = ([cell(task, method, share) for task in tasks] for share in SHARES)
        rows.append((method, *(_shown(tasks, column) for column in values)))
    metric = tasks[0].metric
    better = "higher" if metric.higher_is_better else "lower"
    head = f"## {name}\n\n{metric.unit.capitalize()}, {better} is better; {len(tasks)} trained model(s).\n\n"
    return head + table(("experts dropped", *SHARES), rows)


def _seeds_of(name: str, seeds: int) -> list[Task]:
    """The task for every seed; once where its model is the same for all."""
    tasks = [TASKS[name](seed, lambda line: print(line, file=sys.stderr)) for seed in range(seeds)]
    return list({task.checkpoint: task for task in tasks}.values())


def _shown(tasks: Sequence[Task], values: Sequence[float | None]) -> str:
    """The mean, and the range where there are several; nothing where the method cannot do it."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    spec = tasks[0].metric.spec
    mean = f"{statistics.mean(known):{spec}}"
    return mean if len(known) == 1 else f"{mean} ({min(known):{spec}} to {max(known):{spec}})"


def report(tables: Sequence[str], command: str) -> str:
    """The whole document."""
    body = "\n\n".join(tables)
    return f"""# Methods

`{command}` printed this on {describe_machine()}.

What is left on held-out test data when every layer loses the same share of its experts. Plans are made on the task's
calibration data; nothing is trained afterwards. `random` is the mean of {RANDOM_DRAWS} draws. Where fewer than K
experts are left, K shrinks. Several models: the mean, and the range.

{body}"""


def main() -> None:
    """Measure and print the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="only this one; may be given again")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this one; may be given again")
    parser.add_argument("--seeds", type=int, default=3, help="models that are trained for a task")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [f" --task {name}" for name in options.task or ()] + [
        f" --method {name!r}" for name in options.method or ()
    ]
    command = f"python -m benchmarks.methods --seeds {options.seeds}{''.join(parts)}"
    try:
        tables = [measure_task(name, options.method or list(METHODS), options.seeds) for name in options.task or TASKS]
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(report(tables, command))


if __name__ == "__main__":
    main()
