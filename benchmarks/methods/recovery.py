"""How a pruned model is trained: the same few steps for every method."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.methods.subject import Subject
from models.checkpoints import load_model
from models.moe_layers import MoELayer, find_moe_layers
from moe_spec.layer_plan import ALIAS
from moe_spec.plan import PruningPlan
from moe_spec.record import Json
from pruning.finetuning import seer
from pruning.finetuning.examples import inputs, labelled
from pruning.finetuning.objectives import task_loss
from pruning.finetuning.options import Method, RouterKD, Seer, TaskSpecific, name_of
from pruning.finetuning.recipe import Recipe, recipe
from pruning.finetuning.router_kd import distil
from pruning.finetuning.task_specific import TaskSpecificPruning
from pruning.finetuning.training import train

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "language": {"steps": 20, "batch_size": 4, "learning_rate": 1e-3},
    "images": {"steps": 20, "batch_size": 64, "learning_rate": 1e-3},
    "newsgroups": {"steps": 20, "batch_size": 8, "learning_rate": 3e-5},
}
"""Of the language tasks, and of others by name; batch and rate were chosen on training examples."""


def recipe_of(subject: Subject) -> Recipe:
    """AdamW, in an order of the subject's seed."""
    own = RECIPES.get(subject.task.name, RECIPES["language"])
    return dataclasses.replace(recipe("adamw"), seed=subject.seed, **own)


def recorded(method: Method, how: Recipe) -> Json:
    """All that training depends on; a teacher is the model that was pruned, and is known."""
    options = {name: value for name, value in dataclasses.asdict(method).items() if name != "teacher"}
    return {"method": name_of(method), "options": options, "recipe": dataclasses.asdict(how)}


def learn(model: PreTrainedModel, subject: Subject, method: Method, how: Recipe) -> None:
    """Train ``model`` in place on the task's examples for fine-tuning.

    Raises:
        UserError: the method does not suit the model.
    """
    data, where = subject.task.read(subject.task.finetune), str(subject.task.finetune)
    match method:
        case RouterKD():
            teacher = load_model(method.teacher)
            distil(model, teacher, inputs(data, model, where), method.temperature, how)
        case Seer():
            seer.fine_tune(model, labelled(data, model, where), method, how)
        case TaskSpecific():
            train(model, labelled(data, model, where), task_loss, how, callbacks=[TaskSpecificPruning(method)])
        case _:
            train(model, labelled(data, model, where), task_loss, how)


def hold_together(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Rows of a router that share an expert go on sharing it: each of its copies gets the sum of their gradients.

    Where gradients are clipped, a shared expert counts once a row.
    """
    for layer in find_moe_layers(model):
        planned = plan.layer(layer.name)
        if planned is not None and planned.router == ALIAS:
            own_E = torch.tensor(planned.survivor_of)
            _on_gradients(layer, functools.partial(_summed, own_E))


def _summed(own_E: Tensor, gradient: Tensor) -> Tensor:
    """(E, ...): of each expert what all that share it with it have together."""
    return torch.zeros_like(gradient).index_add(0, own_E, gradient)[own_E]


def _on_gradients(layer: MoELayer, change: Callable[[Tensor], Tensor]) -> None:
    for parameter in layer.experts.parameters(recurse=False):
        hold: Any = parameter.register_hook  # torch leaves it untyped
        hold(change)
