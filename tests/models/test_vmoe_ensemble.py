"""An ensemble E3: every member is a V-MoE of its own, and all of them share what is not a router or an expert."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from torch.nn import functional

from models.moe_layers import find_moe_layers
from models.vmoe.configuration import VMoeConfig
from models.vmoe.modeling import VMoeForImageClassification
from tests.models_table import EXPERTS, TOP_K, example_inputs, vmoe_ensemble

MEMBERS = 2


@pytest.fixture
def model():
    return vmoe_ensemble()


@pytest.fixture
def pixel_values(model):
    return example_inputs(model, 5, 0, seed=1)["pixel_values"]


def alone(model, member):
    """The V-MoE that ``member`` is."""
    config = VMoeConfig(**{**model.config.to_dict(), "ensemble_size": 1})
    single = VMoeForImageClassification(config).eval()
    own, others = f".members.{member}.", ".members."
    weights = {name.replace(own, "."): weight for name, weight in model.state_dict().items()}
    single.load_state_dict({name: weight for name, weight in weights.items() if others not in name})
    return single


def test_every_member_of_a_block_is_a_layer():
    layers = find_moe_layers(vmoe_ensemble())
    assert [(layer.name, layer.num_experts, layer.top_k) for layer in layers] == [
        (f"layers.{block}.mlp.members.{member}", EXPERTS, TOP_K) for block in (0, 1) for member in range(MEMBERS)
    ]


def test_an_ensemble_gives_the_mean_probability_of_its_members(model, pixel_values):
    singles = [alone(model, member)(pixel_values).logits for member in range(MEMBERS)]
    assert (singles[0] - singles[1]).abs().max() > 0.1
    expected = torch.stack([logits.softmax(dim=-1) for logits in singles]).mean(dim=0)
    torch.testing.assert_close(model(pixel_values).logits.exp(), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_is_that_of_the_mean_probability(model, pixel_values):
    labels = torch.tensor([0, 1, 2, 3, 4])
    judged = model(pixel_values, labels)
    assert judged.aux_loss is None
    torch.testing.assert_close(judged.loss, functional.nll_loss(judged.logits, labels))


def test_in_training_every_member_is_judged_by_itself(model, pixel_values, monkeypatch):
    labels = torch.tensor([0, 1, 2, 3, 4])
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # routers without their noise
    singles = [nn.Module.train(alone(model, member))(pixel_values, labels).loss for member in range(MEMBERS)]
    loss = nn.Module.train(model)(pixel_values, labels).loss
    torch.testing.assert_close(loss, torch.stack(singles).mean())
    torch.autograd.backward(loss)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"ensemble_size": 0}, "an ensemble has at least one member, not 0"),
        ({"ensemble_size": 2, "moe_every": 5}, "none of 4 blocks has experts for 2 members"),
    ],
)
def test_an_impossible_ensemble_is_refused(sizes, what):
    with pytest.raises(StrictDataclassClassValidationError) as refusal:
        VMoeConfig(**sizes)
    assert str(refusal.value.__cause__) == what
