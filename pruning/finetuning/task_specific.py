"""Prune while the task is learned, as a callback of transformers' Trainer: https://arxiv.org/abs/2206.00277."""

import contextlib
import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback

from models.moe_layers import MoELayer, find_moe_layers, require_token_choice
from moe_spec.errors import UserError
from moe_spec.feasibility import check_floor
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from pruning.finetuning.mask import ExpertMask
from pruning.finetuning.options import HIT_RATE, TaskSpecific, name_of
from pruning.finetuning.proficiency import Scores, best, drop_steps, normalised, survivors
from pruning.finetuning.routing import Routing, watched
from pruning.finetuning.temporary import without_balance_loss


class TaskSpecificPruning(TrainerCallback):
    """Counts what routers choose while the model trains, and drops experts by the rule of `proficiency`.

    Dropped experts are unselectable from the step at which they go. When the training ends they are removed from the
    model in memory, which then has ``floor`` experts a layer; with one its gate is 1, as a softmax over one is. The
    model's own balance loss is off in the meantime. With the variant ``two-pass`` this is the first run; apply `plan`
    to the checkpoint and train again.

        pruning = TaskSpecificPruning(TaskSpecific(beta=0.5))
        Trainer(model, arguments, train_dataset=data, callbacks=[pruning]).train()
        pruning.plan(checkpoint_sha256(checkpoint)).save(Path("plan.json"))

    Attributes:
        drops: ``(step, layer, ids left)`` of every time that experts went.
    """

    def __init__(self, options: TaskSpecific | None = None) -> None:
        self._options = options or TaskSpecific()
        self._during = contextlib.ExitStack()
        self._layers: dict[str, MoELayer] = {}
        self._window: dict[str, Scores] = {}
        self._scores: dict[str, Scores] = {}
        self.drops: list[tuple[int, str, tuple[int, ...]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start to watch.

        Raises:
            UserError: fewer steps than windows, fewer experts than the floor, or routing groups.
        """
        model: PreTrainedModel = kwargs["model"]
        self._layers = {layer.name: layer for layer in find_moe_layers(model)}
        check_dropping(model, self._options, state.max_steps)
        self._at = drop_steps(self._options, state.max_steps)
        for layer in self._layers.values():
            self._window[layer.name], self._scores[layer.name] = np.zeros((2, layer.num_experts))
        self._model = model
        self._mask = ExpertMask(model)
        for watching in (self._mask.applied(), watched(model, self._observe), without_balance_loss(model)):
            self._during.enter_context(watching)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 # the Trainer's names
        """At the end of a window, drop."""
        if state.global_step in self._at:
            for name in self._layers:
                self._drop(name, state.global_step, self._at[state.global_step])

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Remove the experts that were dropped."""
        self._during.close()
        apply_plan(self._model, self.plan(""))

    def plan(self, model_sha256: str) -> PruningPlan:
        """What was dropped, as a plan for the model whose hash is ``model_sha256``: that which was trained."""
        layers = (
            LayerPlan(
                name=name,
                experts=layer.num_experts,
                top_k=min(layer.top_k, self._options.floor),
                keep=self._mask.alive[name],
                scores=tuple(self._scores[name].tolist()),
            )
            for name, layer in self._layers.items()
        )
        return PruningPlan(model_sha256, name_of(self._options), tuple(layers), dataclasses.asdict(self._options))

    def _observe(self, name: str, routing: Routing) -> None:
        if not self._model.training:  # evaluations between two steps do not count
            return
        ids_S, gates_S = routing.ids_TK.flatten(), routing.gates_TK.detach().flatten().double()
        weights_S = torch.ones_like(gates_S) if self._options.score == HIT_RATE else gates_S
        experts = self._layers[name].num_experts
        self._window[name] += torch.bincount(ids_S, weights_S, minlength=experts).cpu().numpy()

    def _drop(self, name: str, step: int, beta: float | None) -> None:
        """End a window of layer ``name``; without ``beta`` only the best stay."""
        alive, floor = self._mask.alive[name], self._options.floor
        self._scores[name] = normalised(self._scores[name] + normalised(self._window[name], alive), alive)
        self._window[name][:] = 0
        scores_E = self._scores[name]
        left = best(scores_E, alive, floor) if beta is None else survivors(scores_E, alive, beta, floor)
        if left != alive:
            self._mask.keep(name, left)
            self.drops.append((step, name, left))


def last_plan(model: PreTrainedModel, options: TaskSpecific) -> PruningPlan:
    """What training leaves of ``model``, but for which experts these are: here the first ones."""
    plans = (
        LayerPlan(layer.name, layer.num_experts, min(layer.top_k, options.floor), tuple(range(options.floor)))
        for layer in find_moe_layers(model)
    )
    return PruningPlan("", name_of(options), tuple(plans))


def check_dropping(model: PreTrainedModel, options: TaskSpecific, steps: int) -> None:
    """Refuse a model that cannot be pruned while it learns in ``steps`` steps; its weights are not looked at.

    Raises:
        UserError: fewer steps than windows, fewer experts than the floor, routing groups, or experts that choose.
    """
    drop_steps(options, steps)
    layers = find_moe_layers(model)
    require_token_choice(layers)
    for layer in layers:
        if layer.groups is not None:
            raise UserError(
                f"layer {layer.name} routes in {layer.groups.count} groups, which experts that go one by one leave "
                "uneven",
                hint="plan with moe-edge plan, prune, and recover with --method plain",
            )
        check_floor(layer.name, layer.num_experts, options.floor)
