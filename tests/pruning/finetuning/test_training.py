"""The loop: every family learns, the same way every time, and nothing but weights changes."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from moe_spec.errors import UserError
from pruning.finetuning.objectives import task_loss
from pruning.finetuning.recipe import RECIPES
from pruning.finetuning.temporary import without_balance_loss
from pruning.finetuning.training import train
from tests.families.configs import tiny
from tests.heard import Heard
from tests.models_table import TINY, example_inputs
from tests.pruning.finetuning.examples import columns, quick


@pytest.mark.parametrize("name", TINY)
def test_every_family_learns_in_place(name):
    model, heard = TINY[name](), Heard()
    before, inputs = model.config.to_dict(), example_inputs(model, 2, 5, seed=1)
    untrained = model(**inputs).logits
    losses = train(model, columns(model), task_loss, quick(30), on_progress=heard)
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert heard.counts("training") == [(step, 30) for step in range(1, 31)]
    assert model.config.to_dict() == before
    assert not model.training
    assert (model(**inputs).logits - untrained).abs().max() > 0.01


@pytest.mark.parametrize("name", ["vmoe", "mixtral"])
def test_the_seed_decides_everything(name):
    def weights(seed):
        model = TINY[name]()
        losses = train(model, columns(model), task_loss, quick(4, seed=seed))
        return losses, torch.cat([parameter.flatten() for parameter in model.parameters()])

    (first, again, other) = (weights(seed) for seed in (3, 3, 4))
    assert first[0] == again[0] != other[0]
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("name", ["router-norm-cifar", "router-norm-imagenet"])
def test_sgd_steps_are_those_of_the_schedule_with_momentum_and_clipped_gradients(name):
    """Every parameter has the same gradient, far too long: what it has moved by is known for every step."""
    model, steps, moved = TINY["vmoe"](), 20, []
    recipe = dataclasses.replace(RECIPES[name], steps=steps, batch_size=4)
    parameters = list(model.parameters())
    start = parameters[0].detach().flatten()[0].item()

    def objective(trained, batch):
        return 1000 * torch.stack([parameter.sum() for parameter in trained.parameters()]).sum()

    def note(step, total):
        moved.append(parameters[0].detach().flatten()[0].item() - start)

    train(model, columns(model, 8), objective, recipe, after_step=[note])
    clipped = 10 / math.sqrt(sum(parameter.numel() for parameter in parameters))
    expected, velocity = [0.0], 0.0
    for step in range(steps):
        velocity = 0.9 * velocity + clipped
        expected.append(expected[-1] - rate(recipe, step) * velocity)
    assert rate(recipe, 0) == 0
    assert moved == pytest.approx(expected[1:], rel=1e-3, abs=1e-7)


def rate(recipe, step):
    """Linear to the peak, then half a cosine to 1e-5."""
    warm = round(recipe.warmup * recipe.steps)
    if step < warm:
        return recipe.learning_rate * step / warm
    cosine = (1 + math.cos(math.pi * (step - warm) / (recipe.steps - warm))) / 2
    return 1e-5 + cosine * (recipe.learning_rate - 1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_warms_up_and_ends_at_its_final_rate(name, monkeypatch):
    recipe, rates = dataclasses.replace(RECIPES[name], steps=20, batch_size=4), []
    kind: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[recipe.optimizer]
    step = kind.step

    def recorded(self, *arguments, **keywords):
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[0].get("momentum", 0) == recipe.momentum
        assert self.param_groups[0]["weight_decay"] == recipe.weight_decay
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(kind, "step", recorded)
    model = TINY["vmoe"]()
    train(model, columns(model, 8), task_loss, recipe)
    peak = round(recipe.warmup * recipe.steps)
    assert rates[: peak + 1] == pytest.approx([recipe.learning_rate * step / peak for step in range(peak + 1)])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(recipe.final_learning_rate, abs=0.03 * recipe.learning_rate)


def test_the_balance_loss_is_off():
    model, seen = TINY["vmoe"](), []

    def objective(trained, batch):
        output = trained(**batch)
        plain = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
        seen.append((output.loss - plain).abs().item())
        assert output.aux_loss > 0
        return output.loss

    train(model, columns(model), objective, quick(2))
    assert seen == [0, 0]
    assert model.config.router_aux_loss_coef == 0.01


def test_the_balance_loss_of_jetmoe_has_a_name_of_its_own():
    model: Any = tiny("jetmoe")
    with without_balance_loss(model):
        assert (model.config.aux_loss_coef, model.aux_loss_coef) == (0, 0)
    assert (model.config.aux_loss_coef, model.aux_loss_coef) == (0.01, 0.01)


def test_an_interrupted_training_puts_the_settings_back():
    model = TINY["mixtral"]()

    def objective(trained, batch):
        raise KeyboardInterrupt

    before = model.config.to_dict(), model.router_aux_loss_coef
    with pytest.raises(KeyboardInterrupt):
        train(model, columns(model), objective, quick(2))
    assert (model.config.to_dict(), model.router_aux_loss_coef) == before


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_training(value):
    model, factors = TINY["vmoe"](), iter([1.0, 1.0, float(value)])

    def objective(trained, batch):
        return task_loss(trained, batch) * next(factors)

    with pytest.raises(UserError) as caught:
        train(model, columns(model), objective, quick(5))
    assert (caught.value.what, caught.value.hint) == (
        f"the loss of step 3 is {value}",
        "give a lower --learning-rate",
    )


def test_several_gpus_train_no_replicas(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    model, seen = TINY["vmoe"](), []

    def objective(trained, batch):
        seen.append((trained is model, len(batch["labels"])))
        return task_loss(trained, batch)

    train(model, columns(model), objective, quick(2))
    assert seen == [(True, 8)] * 2
