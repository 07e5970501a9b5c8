"""Merging is safe up to a reduction factor: no worse than a small model from scratch, https://arxiv.org/abs/2409.01483."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from benchmarks.claims.claim import Claim, Finding, Outcome, Scores
from benchmarks.claims.lab import Training, score
from benchmarks.claims.subjects import DOMAIN, SMALL, small_language
from benchmarks.markdown import table
from benchmarks.methods.subject import Subject
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Report
from moe_spec.layer_plan import MEAN
from moe_spec.plan import PruningPlan
from pruning.finetuning.recipe import recipe
from pruning.options import PlanOptions
from pruning.plan import make_plan

EXPERTS, FACTORS = 8, (2, 4, 8)
SAFE = 2
"""The factor that the paper calls safe for its largest models; with 32 experts it is 4."""

FINE_TUNING = Training(dataclasses.replace(recipe("adamw"), steps=80, learning_rate=1e-3, batch_size=8))
ROUTERS_FIRST = 16

MERGED, AVERAGED, DROPPED, SCRATCH = "uncurl", "uncurl, mean router rows", "frequency", "from scratch"


def merged(task: Task, experts: int, seed: int) -> tuple[PruningPlan, Training]:
    """UNCURL, and a router that is drawn anew and trained before everything else."""
    plan = make_plan(Subject(task, 0).statistics, PlanOptions(experts, "uncurl", seed=seed, clamp_top_k=True))
    return plan, dataclasses.replace(FINE_TUNING, routers_first=ROUTERS_FIRST)


def averaged(task: Task, experts: int, _seed: int) -> tuple[PruningPlan, Training]:
    """The same merge with a router that is not drawn anew, which the paper does not do: what the router costs."""
    plan = make_plan(Subject(task, 0).statistics, PlanOptions(experts, "uncurl", router=MEAN, clamp_top_k=True))
    return plan, FINE_TUNING


def dropped(task: Task, experts: int, _seed: int) -> tuple[PruningPlan, Training]:
    """The most frequent experts stay, and their rows."""
    return make_plan(Subject(task, 0).statistics, PlanOptions(experts, "frequency", clamp_top_k=True)), FINE_TUNING


WAYS: Mapping[str, Callable[[Task, int, int], tuple[PruningPlan, Training]]] = {
    MERGED: merged,
    AVERAGED: averaged,
    DROPPED: dropped,
}


def measure(seeds: int, report: Report) -> Outcome:
    """On code."""
    parents = [small_language(EXPERTS, seed, report) for seed in range(seeds)]
    columns: dict[str, list[Scores]] = {way: [] for way in (*WAYS, SCRATCH)}
    for factor in FACTORS:
        experts = EXPERTS // factor
        for way, prune in WAYS.items():
            report(f"UNCURL: {way}, {experts} experts")
            columns[way].append(_scores(parents, [prune(task, experts, seed) for seed, task in enumerate(parents)]))
        report(f"UNCURL: {experts} experts from scratch")
        small = [small_language(experts, seed, report) for seed in range(seeds)]
        columns[SCRATCH].append(_scores(small, [(None, FINE_TUNING)] * seeds))
    unpruned = _scores(parents, [(None, FINE_TUNING)] * seeds)
    return Outcome({DOMAIN: judge(columns)}, _table(columns, unpruned))


def _scores(tasks: Sequence[Task], how: Sequence[tuple[PruningPlan | None, Training]]) -> Scores:
    """Of each task's model, pruned and trained; the seed of a training is the number of its task."""
    return Scores(
        tasks[0].metric,
        [
            score(task, plan, dataclasses.replace(training, recipe=dataclasses.replace(training.recipe, seed=seed)))
            for seed, (task, (plan, training)) in enumerate(zip(tasks, how, strict=True))
        ],
    )


def judge(columns: Mapping[str, Sequence[Scores]]) -> Finding:
    """The rule of the claim: safe at `SAFE` at least, and better than dropping wherever it is safe."""
    safe = safe_factors(columns)
    by_factor = {factor: {way: columns[way][row] for way in columns} for row, factor in enumerate(FACTORS)}
    better = all(by_factor[factor][MERGED].worse_than(by_factor[factor][DROPPED]) < 0 for factor in safe)
    shown = (
        f"factor {factor}: {ways[MERGED]} (from scratch {ways[SCRATCH]}, frequency {ways[DROPPED]})"
        for factor, ways in by_factor.items()
    )
    limit = f"safe up to factor {safe[-1]}" if safe else "safe at no factor"
    return Finding(f"{limit}; {'; '.join(shown)}", SAFE in safe and better)


def safe_factors(columns: Mapping[str, Sequence[Scores]]) -> list[int]:
    """The factors up to the first at which the merged model is worse than the small one from scratch."""
    safe = []
    for factor, ours, small in zip(FACTORS, columns[MERGED], columns[SCRATCH], strict=True):
        if ours.worse_than(small) > 0:
            break
        safe.append(factor)
    return safe


def _table(columns: Mapping[str, Sequence[Scores]], unpruned: Scores) -> str:
    rows = [
        (f"{factor}", f"{EXPERTS // factor}", *(str(columns[way][row]) for way in columns))
        for row, factor in enumerate(FACTORS)
    ]
    note = f"With all {EXPERTS} experts, fine-tuned as long: {unpruned}."
    return f"{table(('factor', 'experts', *columns), rows)}\n\n{note}"


CLAIM = Claim(
    paper="[Sarkar et al.](https://arxiv.org/abs/2409.01483)",
    claimed="experts merged: up to a reduction factor (4 with 32 experts, 2 with 64 and 128) no worse than the small "
    "model from scratch, and better than pruning by frequency",
    rule=f"at factor {SAFE} its mean perplexity after fine-tuning is not above that of the small model from scratch, "
    "and at every factor that is safe so it is below that of frequency pruning",
    setting=f"""Mixtrals with {EXPERTS} experts a layer, K=2 (1 of one expert), {SMALL.layers} layers, H={SMALL.hidden}
and F={SMALL.width}, trained from scratch in {SMALL.steps} steps on three domains, are merged for code into
{EXPERTS}/factor experts. Routers are drawn anew, and {ROUTERS_FIRST} of the {FINE_TUNING.recipe.steps} steps of AdamW
that follow, on code, train them alone. Small models come from scratch by the same recipe as the large ones, and
everything is fine-tuned on code for as many steps. A seed is that of all of it.""",
    measure=measure,
    reason="""What costs is the router that is drawn anew, and the steps that go to it alone. With the mean of the
merged rows instead, a row that was added to see why, the same merge is about as good as frequency pruning or better,
and no worse than from scratch at factors 4 and 8. The paper trains for much longer: on FLAN first, then 50 epochs of a
task.""",
)
