"""Expert choice: every expert takes its C tokens of each image."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from torch.nn import functional

from models.moe_layers import find_moe_layers
from models.vmoe.configuration import EXPERT_CHOICE, VMoeConfig
from models.vmoe.modeling import VMoeForImageClassification
from moe_spec.errors import UserError
from pruning.apply import apply_plan
from tests.models_table import EXPERTS, HIDDEN, example_inputs, vmoe_expert_choice
from tests.oracle import masked, plan_for

CAPACITY, PATCHES = 2, 4
CHOOSING: dict[str, Any] = {"routing": EXPERT_CHOICE}


@pytest.fixture
def model() -> Any:
    return vmoe_expert_choice()


def tokens(images=3):
    return torch.randn(images, PATCHES, HIDDEN, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_every_expert_adds_its_gated_output_to_the_tokens_for_which_it_is_most_probable(model):
    mlp, hidden_BPH = model.layers[0].mlp, tokens()
    experts, expected_BPH = mlp.experts, torch.zeros_like(hidden_BPH)
    for hidden_PH, expected_PH in zip(hidden_BPH, expected_BPH, strict=True):
        probabilities_PE = (hidden_PH @ mlp.router.weight.T).softmax(dim=-1)
        for expert in range(EXPERTS):
            for token in probabilities_PE[:, expert].argsort(descending=True)[:CAPACITY]:
                up = experts.up_proj[expert] @ hidden_PH[token] + experts.up_proj_bias[expert]
                down = experts.down_proj[expert] @ functional.gelu(up) + experts.down_proj_bias[expert]
                expected_PH[token] += probabilities_PE[token, expert] * down
    torch.testing.assert_close(mlp(hidden_BPH)[0], expected_BPH, rtol=0, atol=1e-4)


def test_a_token_that_no_expert_takes_gets_nothing(model):
    mlp, hidden_BPH = model.layers[0].mlp, torch.zeros(1, PATCHES, HIDDEN)
    mlp.router.capacity = 1
    with torch.no_grad():
        mlp.router.weight.zero_()
        mlp.router.weight[:, 0] = torch.tensor([1.0, -1.0]).repeat(EXPERTS // 2)
    hidden_BPH[0, :, 0] = torch.tensor([2.0, -2.0, 0.5, -0.5])  # half of the experts want the most, half the least
    assert mlp.router(hidden_BPH)[2].flatten().tolist() == [0, 1] * (EXPERTS // 2)
    mixed_PH = mlp(hidden_BPH)[0][0]
    assert [bool(token_H.any()) for token_H in mixed_PH] == [True, True, False, False]


def test_what_is_said_of_an_image_does_not_depend_on_the_others(model):
    images = example_inputs(model, 4, 0, seed=1)["pixel_values"]
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone, rtol=0, atol=1e-5)


def test_removing_rows_is_making_the_experts_improbable_and_the_capacity_stays(model):
    pruned = vmoe_expert_choice()
    plan = plan_for(model, {"layers.0.mlp": (1, 4, 6), "layers.1.mlp": (0, 2, 7)})
    apply_plan(pruned, plan)
    inputs = example_inputs(model, 3, 0, seed=2)
    with masked(model, plan):
        expected = model(**inputs).logits
    torch.testing.assert_close(pruned(**inputs).logits, expected, rtol=0, atol=1e-5)
    assert (pruned(**inputs).logits - model(**inputs).logits).abs().max() > 0.01
    assert (pruned.config.num_experts, pruned.config.expert_capacity) == (3, CAPACITY)
    assert [layer.num_experts for layer in find_moe_layers(pruned)] == [3, 3]


@pytest.mark.parametrize(
    ("keep", "router", "what"),
    [
        ((3,), "rows", "layer layers.1.mlp keeps 1 expert, which would choose tokens by a softmax that is 1 for all"),
        ((1, 4), "full", "in layer layers.1.mlp experts choose their tokens: an expert that goes chooses none"),
    ],
)
def test_a_plan_that_leaves_no_choice_is_not_carried_out(model, keep, router, what):
    with pytest.raises(UserError) as caught:
        apply_plan(model, plan_for(model, {"layers.1.mlp": keep}, router=router))
    assert caught.value.what.startswith(what)


def test_training_reaches_every_parameter_and_balances_nothing(model):
    inputs = example_inputs(model, 5, 0, seed=1)
    labels = torch.tensor([0, 1, 2, 3, 4])
    output = nn.Module.train(model)(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits, labels))
    assert output.aux_loss == 0
    torch.autograd.backward(output.loss)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    noisy = [model.layers[0].mlp.router(tokens())[0] for _ in range(2)]
    assert not torch.equal(*noisy)


def test_members_of_an_ensemble_can_have_experts_that_choose():
    config = VMoeConfig(routing=EXPERT_CHOICE, ensemble_size=2, image_size=12)
    model = VMoeForImageClassification(config).train()
    images = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(model(images, torch.tensor([0, 1])).loss)
    assert all(layer.expert_choice for layer in find_moe_layers(model))


@pytest.mark.parametrize(
    ("sizes", "capacity"),
    [
        ({}, 3),  # 16 tokens, 8 experts, factor 1.5
        ({"num_experts": 5}, 5),
        ({"num_experts": 4, "expert_capacity": 3}, 3),  # pruned from 8
        ({"capacity_factor": 8.0}, 16),
    ],
)
def test_the_capacity_is_that_of_the_experts_that_there_were(sizes, capacity):
    config = VMoeConfig(**CHOOSING, **sizes)
    assert config.expert_capacity == capacity
    assert VMoeConfig(**config.to_dict()).expert_capacity == capacity


def test_where_tokens_choose_there_is_no_capacity():
    assert VMoeConfig().expert_capacity is None


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"routing": "both"}, "routing is 'token_choice' or 'expert_choice', not 'both'"),
        ({**CHOOSING, "num_experts": 1}, "one expert has no choice: its softmax is 1 for every token"),
        ({**CHOOSING, "capacity_factor": 9.0}, "an expert takes 18 of the 16 tokens of an image"),
        ({**CHOOSING, "expert_capacity": 0}, "an expert takes 0 of the 16 tokens of an image"),
    ],
)
def test_experts_that_cannot_choose_are_refused(sizes, what):
    with pytest.raises(StrictDataclassClassValidationError) as refusal:
        VMoeConfig(**sizes)
    assert str(refusal.value.__cause__) == what
