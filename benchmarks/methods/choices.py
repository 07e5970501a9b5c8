"""Every way to choose the experts that stay, as a plan for the task's model."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.methods.recovery import learn, recipe_of, recorded
from benchmarks.methods.subject import Subject
from benchmarks.tasks.cache import cached
from models.checkpoints import load_model, save_model
from moe_spec.errors import UserError
from moe_spec.layer_plan import ALIAS, FULL, MEAN, NEW, REPLACE, ROWS, UNTOUCHED
from moe_spec.plan import PruningPlan
from moe_spec.record import Json
from pruning.budget.keep import Keep
from pruning.criteria import CRITERIA
from pruning.finetuning.options import Plain
from pruning.merging.mergers import MERGERS
from pruning.options import PlanOptions
from pruning.plan import make_plan
from pruning.plan_on_data import DataOptions, plan_on_data

ROUNDS = 4
TUNING = 3
"""So many times the steps of a recovery show `router-norm` what the task changes."""

PLAN, TUNED = "plan.json", "checkpoint"

Choice = Callable[[Subject, Keep, int], PruningPlan]
"""Makes a plan; the last argument is the seed of what is drawn."""


def by_criterion(name: str, router: str = ROWS, scope: str = "layer") -> Choice:
    """Rank or merge once, by the criterion ``name``."""

    def choose(subject: Subject, keep: Keep, seed: int) -> PruningPlan:
        # over all layers K is every layer's floor, unless one expert a layer is asked for
        clamp = router not in UNTOUCHED and (scope == "layer" or keep == 1)
        options = PlanOptions(keep, name, scope=scope, seed=seed, clamp_top_k=clamp, router=router)
        return make_plan(subject.statistics, options)

    return choose


def aimer(subject: Subject, keep: Keep, _seed: int) -> PruningPlan:
    """Rank by the experts' weights alone."""
    return make_plan(subject.task.checkpoint, PlanOptions(keep, "aimer", clamp_top_k=True))


def router_norm(router: str, subject: Subject, keep: Keep, _seed: int) -> PruningPlan:
    """Rank by what fine-tuning on the task changes in the routers; applied to the model as it was before."""
    options = PlanOptions(
        keep, "router-norm", clamp_top_k=router == ROWS, router=router, pretrained=subject.task.checkpoint
    )
    return make_plan(tuned(subject), options)


def tuned(subject: Subject) -> Path:
    """The task's model, fine-tuned; once."""
    short = recipe_of(subject)
    how = dataclasses.replace(short, steps=TUNING * short.steps)

    def make(directory: Path) -> Json:
        model = load_model(subject.task.checkpoint)
        learn(model, subject, Plain(), how)
        save_model(model, directory / TUNED)
        return {}

    return cached(f"tuned-{subject.task.name}", subject.model | recorded(Plain(), how), make) / TUNED


def in_rounds(subject: Subject, keep: Keep, _seed: int) -> PruningPlan:
    """REAP in rounds of pruning and looking again."""
    return _on_data(subject, PlanOptions(keep, "reap", clamp_top_k=True), DataOptions(rounds=ROUNDS))


def naee(subject: Subject, keep: Keep, _seed: int) -> PruningPlan:
    """Search for the experts whose absence changes a layer least."""
    return _on_data(subject, PlanOptions(keep, "naee"), DataOptions())


def _on_data(subject: Subject, options: PlanOptions, how: DataOptions) -> PruningPlan:
    with tempfile.TemporaryDirectory() as scratch:
        return plan_on_data(subject.task.checkpoint, subject.task.calibration, options, Path(scratch) / PLAN, how)


CHOICES: Mapping[str, Choice] = {
    **{name: by_criterion(name, ROWS) for name in ("random", *CRITERIA)},
    "random, full router": by_criterion("random", FULL),
    "frequency, full router": by_criterion("frequency", FULL),
    "mone, mean outputs": by_criterion("mone", REPLACE),
    "seer-soft, global": by_criterion("seer-soft", scope="global"),
    "reap, global": by_criterion("reap", scope="global"),
    **{name: by_criterion(name, MEAN if row.router == NEW else row.router) for name, row in MERGERS.items()},
    **{f"{name}, shared": by_criterion(name, ALIAS) for name, row in MERGERS.items() if row.published == ALIAS},
    "uncurl, new router": by_criterion("uncurl", NEW),
    "aimer": aimer,
    "router-norm": functools.partial(router_norm, ROWS),
    "router-norm, full router": functools.partial(router_norm, FULL),
    f"reap, {ROUNDS} rounds": in_rounds,
    "naee": naee,
}
"""Every way to choose."""


def plan_of(subject: Subject, choice: str, keep: Keep, seed: int) -> PruningPlan | None:
    """What ``choice`` plans, made once; None where it cannot, for want of K experts."""

    def make(directory: Path) -> Json:
        try:
            CHOICES[choice](subject, keep, seed).save(directory / PLAN)
        except UserError as error:
            return {"refused": str(error)}
        return {}

    recipe = subject.calibrated | {"choice": choice, "keep": keep, "seed": seed}
    path = cached(f"plan-{subject.task.name}", recipe, make) / PLAN
    return PruningPlan.load(path) if path.exists() else None
