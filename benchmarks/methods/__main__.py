"""What is left of a model when a share of its experts goes, by every method, with and without recovery.

    python -m benchmarks.methods --seeds 3 > benchmarks/methods.md

Each cell is one model, pruned in memory by the plan that ``moe-edge plan`` makes, on the task's held-out test data;
in a second table every model is trained a little after it was pruned. Cells are kept in the cache of
``benchmarks.tasks`` and not measured again; a run that was cut goes on. With ``--task`` and ``--method`` only a part
is measured.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch

from benchmarks.markdown import mean_and_range, table
from benchmarks.methods.choices import TUNING
from benchmarks.methods.recovery import recipe_of
from benchmarks.methods.rows import RANDOM_DRAWS, RECOVERED, UNPRUNED, UNTRAINED, Row
from benchmarks.methods.subject import Subject
from benchmarks.tasks import TASKS
from benchmarks.tasks.metrics import Metric
from moe_spec.errors import UserError
from pruning.budget.keep import Keep
from runtime.measuring.machine import describe_machine

SHARES: Mapping[str, Keep] = {"25 %": 0.75, "50 %": 0.5, "75 %": 0.25, "all but one": 1}
"""What is dropped of every layer's experts, and what is kept."""

TABLES: Mapping[str, Mapping[str, Row]] = {"not trained": UNTRAINED, "recovered": RECOVERED}


def measure_task(name: str, methods: Sequence[str], seeds: int) -> str:
    """Both tables of one task: methods down, shares across; progress goes to stderr."""
    subjects = [Subject(TASKS[name](seed, lambda line: print(line, file=sys.stderr)), seed) for seed in range(seeds)]
    metric, how = subjects[0].task.metric, recipe_of(subjects[0])
    better = "higher" if metric.higher_is_better else "lower"
    models = len({subject.task.checkpoint for subject in subjects})
    head = f"""## {name}

{metric.unit.capitalize()}, {better} is better; {seeds} seed(s), {models} trained model(s).
Recovery: {how.steps} steps of {how.batch_size} examples, learning rate {how.learning_rate:g}."""
    tables = (
        table(
            (title, *SHARES),
            [_row(f"{name}, {title}", row, rows[row], subjects) for row in rows if row in (UNPRUNED, *methods)],
        )
        for title, rows in TABLES.items()
    )
    return "\n\n".join((head, *tables))


def _row(where: str, name: str, row: Row, subjects: Sequence[Subject]) -> tuple[str, ...]:
    print(f"{where}: {name}", file=sys.stderr, flush=True)
    metric = subjects[0].task.metric
    return name, *(_shown(metric, [row(subject, keep) for subject in subjects]) for keep in SHARES.values())


def _shown(metric: Metric, values: Sequence[float | None]) -> str:
    """The mean, and the range where there are several; nothing where the method cannot do it."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    return mean_and_range(known, metric.spec)


def report(tables: Sequence[str], command: str) -> str:
    """The whole document."""
    body = "\n\n".join(tables)
    return f"""# Methods

`{command}` printed this on {describe_machine()}.

What is left on held-out test data when every layer loses the same share of its experts; with `global`, all layers
together. Plans are made on the task's calibration data. Where fewer than K experts are left, K shrinks. The mean over
the seeds, and the range. Models are trained anew with every seed, but for `images`, of which there is one: a seed draws
its 1,000 calibration images from the 60,000 training images, and the order of its recovery.

Of every task the first table trains nothing; random experts are the mean of {RANDOM_DRAWS} draws a seed. For the second
one every pruned model was trained a little on the task's training data, all for the same steps, in the same order and
by the same recipe, and so was the model before pruning; random experts are one draw a seed.

Routers lose the rows of dropped experts, unless a row of the table says otherwise. With `full router` they stay, K too,
and tokens that choose a dropped expert get nothing from it; with `mean outputs` they get its mean output, gated.
Where experts are merged so are rows, into weighted means; `ream` has those of its centroids. `shared` are methods as in
their papers, where all rows stay, and those of a group lead to one expert; `uncurl, new router` too, where all rows are
drawn anew. `router-norm` ranks by what {TUNING} times the steps of a recovery change in the routers of the whole model,
and is applied to the model as it was before them, so that rows differ by their choice only.

Three rows train in a way of their own, for the same steps: `reap, router-kd` the routers only, to give what the whole
model gives; `seer-soft, global, K to 1` with the entropy of the routers added to the loss, while K falls to 1;
`task-specific` drops experts in the first half of them.

{body}"""


def main() -> None:
    """Measure and print the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*UNTRAINED, *(name for name in RECOVERED if name not in UNTRAINED)]
    parser.add_argument("--task", action="append", choices=TASKS, help="only this one; may be given again")
    parser.add_argument("--method", action="append", choices=names, help="only this one; may be given again")
    parser.add_argument("--seeds", type=int, default=3, help="of models, calibration data and recovery")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [f" --task {name}" for name in options.task or ()] + [
        f" --method {name!r}" for name in options.method or ()
    ]
    command = f"python -m benchmarks.methods --seeds {options.seeds}{''.join(parts)}"
    try:
        tables = [measure_task(name, options.method or names, options.seeds) for name in options.task or TASKS]
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(report(tables, command))


if __name__ == "__main__":
    main()
