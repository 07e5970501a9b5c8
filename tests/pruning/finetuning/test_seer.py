"""Routers that become decisive, and K that falls."""

import pytest
import torch
from torch.nn import functional
from transformers import trainer_callback

from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from pruning.finetuning.objectives import mean_entropy
from pruning.finetuning.options import Seer
from pruning.finetuning.routing import watched
from pruning.finetuning.seer import fine_tune, lower_steps
from tests.families.configs import tiny
from tests.heard import Heard
from tests.models_table import EXPERTS, TINY, example_inputs
from tests.pruning.finetuning.examples import columns, quick


def entropy_of(model):
    logits: list[torch.Tensor] = []
    with torch.no_grad(), watched(model, lambda _, routing: logits.append(routing.logits_TE)):
        model(**{name: column for name, column in columns(model).items() if name != "labels"})
    return mean_entropy(logits, find_moe_layers(model)[0].score).item()


PECULIAR = ["deepseek_v4", "gemma4"]
"""Scores that are the root of a softplus, and a router that answers with probabilities."""


@pytest.mark.parametrize("name", PECULIAR)
def test_the_entropy_is_that_of_the_scores(name):
    model, entropies = tiny(name), []

    def note(_router, _inputs, answer):
        scores_TE = answer[0] if name == "gemma4" else functional.softplus(answer[0]).sqrt()
        p_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
        entropies.append(-(p_TE * p_TE.log()).sum(dim=-1).mean().item())

    for layer in find_moe_layers(model):
        layer.router.register_forward_hook(note)
    assert entropy_of(model) == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


@pytest.mark.parametrize("name", [*TINY, "deepseek_v4"])
def test_the_entropy_falls_with_its_weight(name):
    after = []
    for weight in (0.0, 1.0):
        model = tiny(name)
        fine_tune(model, columns(model), Seer(entropy_weight=weight), quick(20))
        after.append(entropy_of(model))
    assert after[1] < after[0] - 0.02


@pytest.mark.parametrize("name", TINY)
def test_k_falls_and_the_checkpoint_says_so(name, tmp_path):
    model = TINY[name]()
    selected = []
    with watched(model, lambda _, routing: selected.append(routing.ids_TK.shape[1])):
        fine_tune(model, columns(model), Seer(top_k=1, lower_at=(2,)), quick(4))
    assert selected == [2] * 4 + [1] * 4  # two layers, four steps
    save_model(model, tmp_path / "lower")
    loaded = load_model(tmp_path / "lower")
    assert [(layer.num_experts, layer.top_k) for layer in find_moe_layers(loaded)] == [(EXPERTS, 1)] * 2
    inputs = example_inputs(model, 2, 5, seed=1)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Seer(), {}),
        (Seer(top_k=4), {}),
        (Seer(top_k=2), {25: 3, 50: 2}),
        (Seer(top_k=2, lower_at=(10, 90)), {10: 3, 90: 2}),
    ],
)
def test_when_k_falls(options, expected):
    assert lower_steps(options, top_k=4, steps=100) == expected


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (Seer(top_k=5), "--top-k 5 is more than the K=4 that the model has", "give at most --top-k 4"),
        (
            Seer(top_k=2, lower_at=(10,)),
            "K falls from 4 to 2 in 2 steps, but is to fall after [10] of 100",
            "give 2 ascending --lower-at below 100, or more --steps",
        ),
        (
            Seer(top_k=2, lower_at=(90, 10)),
            "K falls from 4 to 2 in 2 steps, but is to fall after [90, 10] of 100",
            "give 2 ascending --lower-at below 100, or more --steps",
        ),
        (
            Seer(top_k=3, lower_at=(100,)),
            "K falls from 4 to 3 in 1 steps, but is to fall after [100] of 100",
            "give 1 ascending --lower-at below 100, or more --steps",
        ),
        (
            Seer(lower_at=(10,)),
            "K falls from 4 to 4 in 0 steps, but is to fall after [10] of 100",
            "give 0 ascending --lower-at below 100, or more --steps",
        ),
    ],
)
def test_what_cannot_be_scheduled_is_refused(options, what, hint):
    with pytest.raises(UserError) as caught:
        lower_steps(options, top_k=4, steps=100)
    assert (caught.value.what, caught.value.hint) == (what, hint)


def test_progress_beside_a_falling_top_k_warns_of_nothing(monkeypatch):
    monkeypatch.setattr(trainer_callback.logger, "warning", pytest.fail)  # of two callbacks of a kind
    model = TINY["mixtral"]()
    heard = Heard()
    fine_tune(model, columns(model), Seer(top_k=1), quick(4), on_progress=heard)
    assert heard.counts("training") == [(1, 4), (2, 4), (3, 4), (4, 4)]
