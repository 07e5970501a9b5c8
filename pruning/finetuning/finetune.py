"""Finetune: train a checkpoint on task data by one of the methods, into a new checkpoint."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from models.checkpoints import cast_like, load_model, load_skeleton, save_model
from models.moe_layers import find_moe_layers, require_token_choice
from models.own_code import copy_code
from moe_spec.companions import copy_companions
from moe_spec.dataset import Dataset, load_dataset
from moe_spec.files import new_directory, refuse_existing
from moe_spec.identity import checkpoint_sha256, checkpoint_weights
from moe_spec.plan import PLAN, PruningPlan
from moe_spec.progress import Progress, silent
from moe_spec.record import Json, save_record
from pruning.apply import apply_plan
from pruning.finetuning import seer, task_specific
from pruning.finetuning.examples import inputs, labelled
from pruning.finetuning.full_router import check_full, silenced
from pruning.finetuning.objectives import task_loss
from pruning.finetuning.options import TWO_PASS, FullRouter, Method, Plain, RouterKD, Seer, TaskSpecific, name_of
from pruning.finetuning.recipe import Recipe
from pruning.finetuning.router_kd import check_teacher, distil
from pruning.finetuning.task_specific import TaskSpecificPruning, check_dropping
from pruning.finetuning.training import train
from pruning.prune import require_config_counts

RECORD, SCHEMA = "finetuning.json", 1
"""How a fine-tuned checkpoint came about, kept in its directory."""

_PATHS = ("teacher", "plan")


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """What was done.

    Attributes:
        model_sha256: the checkpoint that was trained.
        data_sha256: what it was trained on.
        method: with its options.
        recipe: optimizer, schedule and seed.
        losses: of every step; of both runs, one after the other, where there are two.
        plan: what was pruned meanwhile, or gave nothing; for the checkpoint that was trained.
        drops: ``(step, layer, ids left)`` of every time that experts went.
        teacher_sha256: the checkpoint that was imitated.
    """

    model_sha256: str
    data_sha256: str
    method: Method
    recipe: Recipe
    losses: tuple[float, ...]
    plan: PruningPlan | None = None
    drops: tuple[tuple[int, str, tuple[int, ...]], ...] = ()
    teacher_sha256: str | None = None

    def first_and_last_loss(self) -> tuple[float, float]:
        """Mean loss of the first and of the last tenth of the steps, at least one each."""
        tenth = max(1, len(self.losses) // 10)
        return sum(self.losses[:tenth]) / tenth, sum(self.losses[-tenth:]) / tenth

    def to_json(self) -> Json:
        """As it stands in finetuning.json; a teacher is known by its hash, wherever it lies, and a plan lies beside."""
        options = {key: value for key, value in dataclasses.asdict(self.method).items() if key not in _PATHS}
        return {
            "model_sha256": self.model_sha256,
            "data_sha256": self.data_sha256,
            "method": name_of(self.method),
            "options": options,
            "recipe": dataclasses.asdict(self.recipe),
            "losses": list(self.losses),
            "drops": [{"step": step, "layer": layer, "left": list(left)} for step, layer, left in self.drops],
            "teacher_sha256": self.teacher_sha256,
        }


def finetune(
    checkpoint: Path,
    data: Path,
    method: Method,
    recipe: Recipe,
    out: Path,
    *,
    trust_remote_code: bool = False,
    on_progress: Progress = silent,
) -> Finetuning:
    """Train a checkpoint and write the result as a new one, with finetuning.json beside it.

    Weights are trained in float32, and written in the dtypes that the checkpoint has them in. Where the
    method prunes, the new checkpoint has the experts that are left, and plan.json says which they are. Behind full
    routers it has all of them, and plan.json is for it: the graph loses those that gave nothing.

    Args:
        checkpoint: transformers directory of a known MoE family.
        data: .npz of model inputs or of images (``moe_spec.dataset``), with ``labels`` for a classifier.
        method: one of ``pruning.finetuning.options.METHODS``, with its options.
        recipe: optimizer, schedule and seed.
        out: directory to write; must not exist.
        trust_remote_code: run the Python files that config.json names (`models.own_code`), a teacher's too.
        on_progress: told after every step.

    Raises:
        UserError: ``out`` exists; checkpoint, teacher or data cannot be read or do not fit together; or the method does
            not suit the model.
    """
    refuse_existing(out)
    checkpoint_weights(checkpoint)  # refuse what is none before the data is blamed
    skeleton_of = functools.partial(load_skeleton, trust_remote_code=trust_remote_code)
    if check := _CHECKS.get(type(method)):
        skeleton = skeleton_of(checkpoint)
        if last := check(skeleton, method, recipe.steps):
            apply_plan(skeleton, last)
            require_config_counts(skeleton, last, checkpoint)
    if isinstance(method, RouterKD):
        check_teacher(skeleton_of(checkpoint), skeleton_of(method.teacher))
    dataset = load_dataset(data, checkpoint)
    job = _Job(checkpoint, dataset, str(data), recipe, trust_remote_code, on_progress)
    model, done = _METHODS[type(method)](job, method)
    cast_like(model, checkpoint, trust_remote_code=trust_remote_code)
    on_progress(f"writing {out}")
    with new_directory(out) as staging:
        save_model(model, staging)
        copy_companions(checkpoint, staging)
        copy_code(checkpoint, staging)
        save_record(staging / RECORD, "finetuning", SCHEMA, done.to_json())
        if done.plan is not None:
            still_to_go = isinstance(method, FullRouter)
            owner = checkpoint_sha256(staging) if still_to_go else done.plan.model_sha256
            dataclasses.replace(done.plan, model_sha256=owner).save(staging / PLAN)
    return done


@dataclasses.dataclass(frozen=True)
class _Job:
    checkpoint: Path
    dataset: Dataset
    where: str
    recipe: Recipe
    trust_remote_code: bool
    on_progress: Progress

    def load(self, checkpoint: Path) -> PreTrainedModel:
        return load_model(checkpoint, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def model_sha256(self) -> str:
        return checkpoint_sha256(self.checkpoint)

    def done(self, method: Method, losses: list[float], **more: Any) -> Finetuning:
        return Finetuning(self.model_sha256, self.dataset.sha256, method, self.recipe, tuple(losses), **more)


Outcome = tuple[PreTrainedModel, Finetuning]


def _plain(job: _Job, method: Plain) -> Outcome:
    model = job.load(job.checkpoint)
    examples = labelled(job.dataset, model, job.where)
    return model, job.done(method, train(model, examples, task_loss, job.recipe, on_progress=job.on_progress))


def _full_router(job: _Job, method: FullRouter) -> Outcome:
    plan = PruningPlan.load(method.plan)
    plan.require_model(job.model_sha256, str(job.checkpoint))
    model = job.load(job.checkpoint)
    examples = labelled(job.dataset, model, job.where)
    with silenced(model, plan):
        losses = train(model, examples, task_loss, job.recipe, on_progress=job.on_progress)
    return model, job.done(method, losses, plan=plan)


def _task_specific(job: _Job, method: TaskSpecific) -> Outcome:
    model = job.load(job.checkpoint)
    examples = labelled(job.dataset, model, job.where)
    pruning = TaskSpecificPruning(method)
    losses = train(model, examples, task_loss, job.recipe, callbacks=[pruning], on_progress=job.on_progress)
    plan = pruning.plan(job.model_sha256)
    if method.variant == TWO_PASS:
        model = job.load(job.checkpoint)
        apply_plan(model, plan)
        losses += train(model, examples, task_loss, job.recipe, on_progress=job.on_progress)
    return model, job.done(method, losses, plan=plan, drops=tuple(pruning.drops))


def _seer(job: _Job, method: Seer) -> Outcome:
    model = job.load(job.checkpoint)
    examples = labelled(job.dataset, model, job.where)
    return model, job.done(method, seer.fine_tune(model, examples, method, job.recipe, job.on_progress))


def _router_kd(job: _Job, method: RouterKD) -> Outcome:
    teacher, model = job.load(method.teacher), job.load(job.checkpoint)
    examples = inputs(job.dataset, model, job.where)
    losses = distil(model, teacher, examples, method.temperature, job.recipe, job.on_progress)
    return model, job.done(method, losses, teacher_sha256=checkpoint_sha256(method.teacher))


def _check_task_specific(model: PreTrainedModel, method: TaskSpecific, steps: int) -> PruningPlan:
    check_dropping(model, method, steps)
    return task_specific.last_plan(model, method)


def _check_seer(model: PreTrainedModel, method: Seer, steps: int) -> PruningPlan | None:
    layers = find_moe_layers(model)
    require_token_choice(layers)
    return seer.last_plan(layers, method, seer.lower_steps(method, layers[0].top_k, steps))


_CHECKS: Mapping[type, Callable[[PreTrainedModel, Any, int], PruningPlan | None]] = {
    FullRouter: check_full,
    TaskSpecific: _check_task_specific,
    Seer: _check_seer,
}
"""What is refused by the shape of a model, before any data is read. They give the counts that the training ends with,
if it changes any: what cannot be is refused now, not once it is trained."""

_METHODS: Mapping[type, Callable[[_Job, Any], Outcome]] = {
    Plain: _plain,
    FullRouter: _full_router,
    TaskSpecific: _task_specific,
    Seer: _seer,
    RouterKD: _router_kd,
}
