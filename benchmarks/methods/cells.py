"""One number: the task's metric of its model, pruned by a plan and trained or not. Measured once for what it is."""

import dataclasses
from pathlib import Path

from benchmarks.methods.recovery import hold_together, learn, recipe_of, recorded
from benchmarks.methods.subject import Subject
from benchmarks.tasks.cache import RECIPE, cached
from models.checkpoints import load_model
from moe_spec.errors import UserError
from moe_spec.layer_plan import NEW
from moe_spec.plan import PruningPlan
from moe_spec.record import Json, Record, parse_object
from pruning.apply import apply_plan
from pruning.finetuning.options import Method


def cell(subject: Subject, plan: PruningPlan | None, method: Method | None = None) -> float | None:
    """The metric; found again by what the plan does, whoever made it.

    Args:
        subject: the model, and the data to train it with.
        plan: None leaves the model whole.
        method: how it is trained afterwards; None not at all.

    Returns:
        None where the method does not suit the model.
    """

    def make(_directory: Path) -> Json:
        try:
            return {"value": measure(subject, plan, method)}
        except UserError as error:
            return {"value": None, "refused": str(error)}

    recipe = subject.model | {"plan": content(plan)}
    if method is not None:
        recipe |= recorded(method, recipe_of(subject))
    path = cached(f"cell-{subject.task.name}", recipe, make) / RECIPE
    remake = f"remove {path.parent}; it is measured again"
    return Record(parse_object(path, path.read_bytes(), remake), str(path), remake).take("value", float, default=None)


def measure(subject: Subject, plan: PruningPlan | None, method: Method | None) -> float:
    """Prune, train, and judge on test data.

    Raises:
        UserError: the method does not suit the model.
    """
    model = load_model(subject.task.checkpoint)
    if plan is not None:
        apply_plan(model, plan)
        hold_together(model, plan)
    if method is not None:
        learn(model, subject, method, recipe_of(subject))
    return subject.task.evaluate(model)


def content(plan: PruningPlan | None) -> Json:
    """What ``plan`` makes of a model: neither who made it, nor the scores that led there."""
    if plan is None:
        return {}
    drawn = {"seed": plan.options["seed"]} if any(layer.router == NEW for layer in plan.layers) else {}
    means = {"means": plan.means_sha256} if plan.means else {}
    named = (
        {"name": layer.name, "keep": layer.keep, "top_k": layer.top_k, "router": layer.router}
        | ({"merge": list(map(dataclasses.asdict, layer.merge)), "align": layer.align} if layer.merge else {})
        for layer in plan.layers
    )
    return {"layers": list(named)} | drawn | means
