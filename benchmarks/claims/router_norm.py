"""The change of router norms ranks better than chance and importance, https://arxiv.org/abs/2405.16646."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping

from benchmarks.claims.claim import Claim, Finding, Outcome, Scores
from benchmarks.claims.lab import Training, score, tuned
from benchmarks.claims.subjects import turned
from benchmarks.markdown import table
from benchmarks.methods.rows import RANDOM_DRAWS
from benchmarks.methods.subject import Subject
from benchmarks.tasks.task import Task
from benchmarks.tasks.training import Report
from moe_spec.layer_plan import FULL, ROWS
from moe_spec.plan import PruningPlan
from pruning.budget.keep import Keep
from pruning.finetuning.options import Plain
from pruning.finetuning.recipe import recipe
from pruning.options import PlanOptions
from pruning.plan import make_plan

SHARES: Mapping[str, Keep] = {"50 %": 0.5, "75 %": 0.25}
POINTS = 1.0

LEARN = dataclasses.replace(recipe("router-norm-cifar"), steps=400, learning_rate=0.05, batch_size=64)
"""The paper's kind of training, in less and larger steps: it has 1,000 of 512 images each, at 0.0015."""
RECOVER = dataclasses.replace(LEARN, steps=100)

UNPRUNED, OURS = "nothing dropped", "router norm"


@dataclasses.dataclass(frozen=True)
class Learned:
    """A model that has learned a task, and where it started."""

    before: Task
    task: Task
    seed: int


Way = Callable[[Learned, Keep, int], PruningPlan]
"""Makes a plan; the last argument is the number of a draw."""


def by_norm(learned: Learned, keep: Keep, _draw: int, router: str = FULL) -> PruningPlan:
    """Those whose router row grew most stay."""
    return make_plan(
        learned.task.checkpoint,
        PlanOptions(
            keep, "router-norm", router=router, clamp_top_k=router == ROWS, pretrained=learned.before.checkpoint
        ),
    )


def by_norm_without_rows(learned: Learned, keep: Keep, draw: int) -> PruningPlan:
    """The same experts; the rows of the others go too."""
    return by_norm(learned, keep, draw, ROWS)


def by_importance(learned: Learned, keep: Keep, _draw: int) -> PruningPlan:
    """Those that were given the largest share of the gates stay."""
    return make_plan(Subject(learned.task, 0).statistics, PlanOptions(keep, "gate-mass", router=FULL))


def at_random(learned: Learned, keep: Keep, draw: int) -> PruningPlan:
    """Whoever is drawn stays; every seed draws others."""
    seed = RANDOM_DRAWS * learned.seed + draw
    return make_plan(learned.task.checkpoint, PlanOptions(keep, "random", router=FULL, seed=seed))


WAYS: Mapping[str, Way] = {
    OURS: by_norm,
    "importance": by_importance,
    "random": at_random,
    "router norm, rows removed": by_norm_without_rows,
}
DRAWS: Mapping[str, int] = {"random": RANDOM_DRAWS}


def measure(seeds: int, report: Report) -> Outcome:
    """On images that the embedded model has to learn first."""
    learned = []
    for seed in range(seeds):
        report(f"router norm: learning, seed {seed}")
        task = turned()
        learned.append(Learned(task, tuned(task, Plain(), dataclasses.replace(LEARN, seed=seed)), seed))
    before, after = _pruned(learned, report), _pruned(learned, report, trained=True)
    return Outcome({learned[0].task.name: judge(before, after)}, _tables(before, after))


Table = Mapping[str, Mapping[str, Scores]]
"""By way, then by share."""


def _pruned(learned: list[Learned], report: Report, *, trained: bool = False) -> Table:
    """What every way leaves; after as much training again, of which `random` gets its first draw only."""
    metric, rows = learned[0].task.metric, {}

    def one(subject: Learned, way: str | None, keep: Keep) -> float:
        training = Training(dataclasses.replace(RECOVER, seed=subject.seed)) if trained else None
        if way is None:
            return score(subject.task, None, training)
        draws = range(1 if trained else DRAWS.get(way, 1))
        return statistics.mean(score(subject.task, WAYS[way](subject, keep, draw), training) for draw in draws)

    for way in (None, *WAYS):
        name = way or UNPRUNED
        report(f"router norm: {name}{', then trained' if trained else ''}")
        rows[name] = {
            share: Scores(metric, [one(subject, way, keep) for subject in learned]) for share, keep in SHARES.items()
        }
    return rows


def judge(before: Table, after: Table) -> Finding:
    """The rule of the claim: better than both controls at every share, and little lost at half once trained."""
    better = all(
        before[OURS][share].worse_than(before[other][share]) < 0
        for share in SHARES
        for other in ("random", "importance")
    )
    half = next(iter(SHARES))
    lost = after[OURS][half].worse_than(after[UNPRUNED][half])
    shown = (
        f"{share} dropped {before[OURS][share]} (importance {before['importance'][share]}, random "
        f"{before['random'][share]}), fine-tuned {after[OURS][share].loss(after[UNPRUNED][share])} below the unpruned"
        for share in SHARES
    )
    return Finding("; ".join(shown), better and lost <= POINTS)


def _tables(before: Table, after: Table) -> str:
    head = ("experts dropped", *(f"{share}{then}" for then in ("", ", fine-tuned") for share in SHARES))
    rows = ((way, *(str(rows[way][share]) for rows in (before, after) for share in SHARES)) for way in before)
    return table(head, rows)


CLAIM = Claim(
    paper="[Chowdhury et al.](https://arxiv.org/abs/2405.16646)",
    claimed="experts ranked by the change of their router norms: better than at random and by importance where half "
    "and more go, and within 1 point of the unpruned model after fine-tuning",
    rule="before any fine-tuning its mean accuracy is above that of `random` and of `importance` both at 50 % and at "
    "75 %, and fine-tuned it is at 50 % at most 1 point below the unpruned model that was fine-tuned as long",
    setting=f"""The embedded V-MoE learns Fashion-MNIST lying on its side: all weights, {LEARN.steps} steps of
{LEARN.batch_size} images, the paper's kind of SGD (momentum {LEARN.momentum}, clip {LEARN.max_grad_norm:g}, warm-up and
cosine) at {LEARN.learning_rate}. Then experts go, and in the columns on the right {RECOVER.steps} such steps follow, in
which dropped experts stay silent. As the paper's, the router stays full, but in the last row. Importance is the gate
mass on 1,000 training images. `random` is the mean of {RANDOM_DRAWS} draws, of which the first is fine-tuned. A seed is
the order of the images.""",
    measure=measure,
    reason="""Norms rank better than chance, and fine-tuning brings the pruned model back; but importance, which
looks at data, ranks no worse here. The whole task is new, so that all experts learn it, while the paper's theory is of
tasks that some experts learn and others do not; and experts stand in two of four blocks beside residual connections, so
that a token which loses one loses little whoever is chosen. Where rows go too, gates that are not renormalised grow for
everyone, and the ranking matters less than that.""",
)
