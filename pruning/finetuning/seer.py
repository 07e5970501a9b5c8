"""Routers that are sure of themselves, so that K can fall: https://arxiv.org/abs/2404.05089, second stage."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from models.moe_layers import MoELayer, find_moe_layers, set_top_k
from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from moe_spec.progress import Progress, silent
from pruning.apply import apply_plan
from pruning.behind_router import is_led
from pruning.finetuning.examples import Inputs
from pruning.finetuning.objectives import mean_entropy, task_loss
from pruning.finetuning.options import Seer, name_of
from pruning.finetuning.recipe import Recipe
from pruning.finetuning.routing import watched
from pruning.finetuning.training import train


def fine_tune(
    model: PreTrainedModel, examples: Inputs, options: Seer, recipe: Recipe, on_progress: Progress = silent
) -> list[float]:
    """Train ``model`` in place on its task with the entropy of its routers; its config has the lower K at the end.

    Returns:
        The loss of every step, entropy included.

    Raises:
        UserError: K is to rise, or the steps at which it falls do not lead there.
    """
    layers = find_moe_layers(model)
    lowered = lower_steps(options, layers[0].top_k, recipe.steps)
    logits: dict[str, Tensor] = {}

    def objective(trained: nn.Module, batch: Inputs) -> Tensor:
        loss = task_loss(trained, batch)  # the routers speak while it is computed
        return loss + options.entropy_weight * mean_entropy(logits.values(), layers[0].score)

    def lower(step: int, _steps: int) -> None:
        if step in lowered:
            for layer in layers:
                set_top_k(model, layer, lowered[step])

    with watched(model, lambda name, routing: logits.update({name: routing.logits_TE})):
        losses = train(model, examples, objective, recipe, after_step=[lower], on_progress=on_progress)
    if plan := last_plan(layers, options, lowered):
        apply_plan(model, plan)  # for the counts in the config
    return losses


def last_plan(layers: Iterable[MoELayer], options: Seer, lowered: Mapping[int, int]) -> PruningPlan | None:
    """What training leaves of a model: all experts, and the last K of `lower_steps`; None where K is as it was.

    Layers behind full routers are not in it: no config says what they are.
    """
    if not lowered:
        return None
    plans = tuple(_all_experts(layer, min(lowered.values())) for layer in layers if not is_led(layer))
    return PruningPlan("", name_of(options), plans) if plans else None


def _all_experts(layer: MoELayer, top_k: int) -> LayerPlan:
    return LayerPlan(layer.name, layer.num_experts, top_k, tuple(range(layer.num_experts)), groups=layer.groups)


def lower_steps(options: Seer, top_k: int, steps: int) -> Mapping[int, int]:
    """After which of ``steps`` steps K falls, and to what.

    >>> lower_steps(Seer(top_k=1), top_k=3, steps=100)
    {25: 2, 50: 1}

    Raises:
        UserError: K is to rise, or there are not as many steps in ``lower_at`` as K falls by, ascending and inside.
    """
    final = top_k if options.top_k is None else options.top_k
    if final > top_k:
        raise UserError(
            f"--top-k {final} is more than the K={top_k} that the model has", hint=f"give at most --top-k {top_k}"
        )
    falls = top_k - final
    half = steps // 2
    at = options.lower_at or tuple(half * fall // falls for fall in range(1, falls + 1))
    if len(at) != falls or list(at) != sorted(set(at)) or not all(0 < step < steps for step in at):
        raise UserError(
            f"K falls from {top_k} to {final} in {falls} steps, but is to fall after {list(at)} of {steps}",
            hint=f"give {falls} ascending --lower-at below {steps}, or more --steps",
        )
    return {step: top_k - fall for fall, step in enumerate(at, start=1)}
