"""Models that are fine-tuned and pruned in turn, and scored; each once."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import PreTrainedModel

from benchmarks.methods.cells import content
from benchmarks.methods.recovery import learn
from benchmarks.methods.subject import Subject
from benchmarks.tasks.cache import RECIPE, cached
from benchmarks.tasks.task import Task
from models.checkpoints import load_model
from models.moe_layers import find_moe_layers
from moe_spec.files import sha256_file
from moe_spec.identity import checkpoint_sha256
from moe_spec.plan import PruningPlan
from moe_spec.record import Json, parse_object
from pruning.apply import apply_plan
from pruning.finetuning.finetune import finetune
from pruning.finetuning.options import Method, Plain, Seer, name_of
from pruning.finetuning.recipe import Recipe

VERSION = 1
"""Raised when the code here makes another number of the same model, plan and training."""

CHECKPOINT = "checkpoint"


@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained once it is pruned.

    Attributes:
        recipe: of all steps.
        method: what is minimised.
        routers_first: of the steps so many train the routers alone, as a router that was drawn anew wants; they are
            a run of their own, warm-up included.
    """

    recipe: Recipe
    method: Plain | Seer = dataclasses.field(default_factory=Plain)
    routers_first: int = 0

    def run(self, model: PreTrainedModel, task: Task) -> None:
        """Train ``model`` in place."""
        subject = Subject(task, self.recipe.seed)
        if self.routers_first:
            with only_routers(model):
                learn(model, subject, self.method, dataclasses.replace(self.recipe, steps=self.routers_first))
        steps = self.recipe.steps - self.routers_first
        learn(model, subject, self.method, dataclasses.replace(self.recipe, steps=steps))


def tuned(task: Task, method: Method, recipe: Recipe) -> Task:
    """``task`` with the checkpoint that ``moe-edge finetune`` makes of its own; made once."""

    def make(directory: Path) -> Json:
        finetune(task.checkpoint, task.finetune, method, recipe, directory / CHECKPOINT)
        return {}

    key = _key(task, Training(recipe), None) | {"method": name_of(method), "options": dataclasses.asdict(method)}
    return dataclasses.replace(task, checkpoint=cached(f"tuned-{task.name}", key, make) / CHECKPOINT)


def score(task: Task, plan: PruningPlan | None = None, training: Training | None = None) -> float:
    """The task's metric, on its test data, of its model pruned by ``plan`` and then trained; measured once."""

    def make() -> Json:
        model = load_model(task.checkpoint)
        if plan is not None:
            apply_plan(model, plan)
        if training is not None:
            training.run(model, task)
        return {"value": task.evaluate(model)}

    key = _key(task, training, plan) | {"test": sha256_file(task.test)}
    return float(noted(f"score-{task.name}", key, make)["value"])


def noted(name: str, key: Json, make: Callable[[], Json]) -> Json:
    """What ``make`` returns, or what it returned when it was called with this ``key`` before."""
    path = cached(name, key, lambda _directory: make()) / RECIPE
    return parse_object(path, path.read_bytes(), f"remove {path.parent}; it is measured again")


def _key(task: Task, training: Training | None, plan: PruningPlan | None) -> Json:
    return {
        "model": checkpoint_sha256(task.checkpoint),
        "data": sha256_file(task.finetune),
        "plan": None if plan is None else content(plan),
        "training": None if training is None else dataclasses.asdict(training),
        "version": VERSION,
    }


@contextlib.contextmanager
def only_routers(model: PreTrainedModel) -> Iterator[None]:
    """Within the block nothing but the routers needs a gradient."""
    routers = {id(parameter) for layer in find_moe_layers(model) for parameter in layer.router.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in routers]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
