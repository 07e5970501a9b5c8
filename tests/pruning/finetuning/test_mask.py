"""A masked model computes, and learns, what the model without the dropped experts does."""

from typing import Any

import pytest
import torch

from models.families import family
from models.moe_layers import find_moe_layers
from pruning.apply import apply_plan
from pruning.finetuning.mask import ExpertMask
from tests.models_table import EXPERTS, TINY, TOP_K, example_inputs
from tests.oracle import plan_for


def keeps_of(model, width):
    """``width`` experts, other ones in each layer; in a model with routing groups the same number of both."""
    grouped = find_moe_layers(model)[0].groups is not None
    first, second = ([1, 5, 2, 7], [3, 4, 0, 6]) if grouped else ([1, 4, 6, 2], [2, 0, 7, 5])
    names = [layer.name for layer in find_moe_layers(model)]
    return dict(zip(names, (tuple(sorted(first[:width])), tuple(sorted(second[:width]))), strict=True))


def masked_and_pruned(name, width):
    """The same tiny model twice, all but ``width`` experts masked in one and removed from the other."""
    model, pruned = TINY[name](), TINY[name]()
    keeps, mask = keeps_of(model, width), ExpertMask(model)
    apply_plan(pruned, plan_for(pruned, keeps, top_k=min(TOP_K, width)))
    for layer, experts in keeps.items():
        mask.keep(layer, experts)
    assert mask.alive == keeps
    return model, mask, pruned


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


CASES = [(name, width) for name in TINY for width in (4, 2, 1) if width == 4 or name != "deepseek_v3"]
"""The torch router of DeepSeek-V3 needs two experts in each of its two groups."""


@pytest.mark.parametrize(("name", "width"), CASES)
def test_a_masked_model_computes_what_the_pruned_one_does(name, width):
    model, mask, pruned = masked_and_pruned(name, width)
    inputs = example_inputs(model, batch=3, sequence=6, seed=0)
    whole = logits(TINY[name](), inputs)
    with mask.applied():
        masked = logits(model, inputs)
    torch.testing.assert_close(masked, logits(pruned, inputs), rtol=0, atol=1e-5)
    assert (masked - whole).abs().max() > 0.05


@pytest.mark.parametrize("name", TINY)
def test_survivors_learn_what_they_would_without_the_others(name):
    model, mask, pruned = masked_and_pruned(name, 4)
    inputs = example_inputs(model, batch=3, sequence=6, seed=0)
    with mask.applied():
        model(**inputs).logits.square().mean().backward()
    pruned(**inputs).logits.square().mean().backward()
    for ours, theirs in zip(find_moe_layers(model), find_moe_layers(pruned), strict=True):
        alive, dropped = list(mask.alive[ours.name]), sorted(set(range(EXPERTS)) - set(mask.alive[ours.name]))
        for module, other in ((ours.router, theirs.router), (ours.experts, theirs.experts)):
            for key, parameter in module.named_parameters(recurse=False):
                gradient: Any = parameter.grad
                assert gradient.isfinite().all()
                assert not gradient[dropped].any(), key
                torch.testing.assert_close(gradient[alive], other.get_parameter(key).grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_a_model_is_as_it_was_when_the_mask_is_gone(name):
    model, mask, _ = masked_and_pruned(name, 4 if name == "deepseek_v3" else 1)
    inputs = example_inputs(model, batch=3, sequence=6, seed=0)
    with mask.applied():
        masked = logits(model, inputs)
    assert [layer.top_k for layer in find_moe_layers(model)] == [TOP_K] * 2
    whole = logits(TINY[name](), inputs)
    assert not torch.equal(masked, whole)
    assert torch.equal(logits(model, inputs), whole)


@pytest.mark.parametrize("name", TINY)
def test_a_dropped_expert_never_wins_however_negative_all_logits_are(name):
    # a mask that multiplies would turn the dropped expert's -0.5 into the largest logit of all
    model = TINY[name]()
    layer = find_moe_layers(model)[0]
    router: Any = layer.router
    with torch.no_grad():
        for tensor in family(model.config.model_type).router_tensors:
            getattr(router, tensor).zero_()
        router.weight[:, 0] = torch.tensor([-0.5, -3, -4, -5, -6, -7, -8, -9])
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias[0] = 0.9  # a sigmoid of -inf and a bias still win
    hidden_TH = torch.zeros(1, layer.hidden_size)
    hidden_TH[0, 0] = 1
    mask = ExpertMask(model)
    mask.keep(layer.name, range(1, EXPERTS))
    with mask.applied():
        seen = router(hidden_TH)
    assert router(hidden_TH)[2][0, 0] == 0
    assert seen[0][0, 0] == -torch.inf
    assert sorted(seen[2][0].tolist()) == [1, 2]
