import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.moe_layers import find_moe_layers
from models.vmoe.configuration import VMoeConfig
from models.vmoe.modeling import VMoeExperts
from pruning.merging.align import agreement, aligned, neurons_first
from pruning.observe import expert_outputs
from tests.models_table import HIDDEN, TINY, WIDTH

SMALL = VMoeExperts(VMoeConfig(num_experts=2, hidden_size=2, intermediate_size=2, num_attention_heads=2))
"""Says how weights lie; the worked example has one output, and no biases."""

J = {"up_proj": torch.eye(2), "down_proj": torch.tensor([[1.0, 2.0]])}
Y = {"up_proj": torch.eye(2).flip(0), "down_proj": torch.tensor([[2.0, 1.0]])}


def test_the_worked_example():
    agreement_FF = agreement(SMALL, J, Y)
    assert agreement_FF.trace() == 4
    assert agreement_FF.flip(1).trace() == 7
    turned = aligned(SMALL, J, Y)
    assert all(torch.equal(turned[name], J[name]) for name in J)


def test_an_average_without_alignment_computes_something_else():
    def output(first, second):
        up, down = ((first[name] + second[name]) / 2 for name in ("up_proj", "down_proj"))
        return (down @ up @ torch.tensor([1.0, 0.0])).item()

    assert (output(J, J), output(J, Y), output(J, aligned(SMALL, J, Y))) == (1, 1.5, 1)


def weights_of(experts, expert):
    return {name: parameter.detach()[expert] for name, parameter in experts.named_parameters()}


@functools.cache
def experts_of(name):
    return find_moe_layers(TINY[name]())[0].experts


@pytest.mark.parametrize("name", TINY)
def test_every_family_says_where_its_neurons_are(name):
    experts = experts_of(name)
    weights = weights_of(experts, 0)
    views = neurons_first(experts, weights)
    assert {len(view) for view in views.values()} == {WIDTH}
    assert weights.keys() - views.keys() <= {"down_proj_bias"}
    for view_name, view in views.items():
        assert view.numel() == weights[view_name].numel()
        assert view.untyped_storage().data_ptr() == weights[view_name].untyped_storage().data_ptr()


@pytest.mark.parametrize("name", TINY)
@settings(max_examples=3, deadline=None)
@given(order=st.permutations(range(WIDTH)))
def test_permuted_neurons_compute_the_same_and_find_back(name, order):
    experts = experts_of(name)
    weights = weights_of(experts, 0)
    permuted = {key: weight.clone() for key, weight in weights.items()}
    for key, view in neurons_first(experts, permuted).items():
        view.copy_(neurons_first(experts, weights)[key][list(order)])
    back = aligned(experts, weights, permuted)
    assert all(torch.equal(back[key], weights[key]) for key in weights)

    hidden_TH = torch.randn(4, HIDDEN)
    with torch.no_grad():
        for key, parameter in experts.named_parameters():
            parameter[1] = weights[key]
        expected = expert_outputs(experts, 1, hidden_TH)
        for key, parameter in experts.named_parameters():
            parameter[1] = permuted[key]
        torch.testing.assert_close(expert_outputs(experts, 1, hidden_TH), expected, rtol=0, atol=1e-5)


def test_the_assignment_is_the_best_of_all():
    generator = torch.Generator().manual_seed(0)
    reference, other = (
        {"up_proj": torch.randn(4, 3, generator=generator), "down_proj": torch.randn(3, 4, generator=generator)}
        for _ in range(2)
    )
    agreement_FF = agreement(SMALL, reference, other)
    best = max(agreement_FF[range(4), list(order)].sum() for order in itertools.permutations(range(4)))
    torch.testing.assert_close(agreement(SMALL, reference, aligned(SMALL, reference, other)).trace(), best)


def test_weights_without_values_stay_as_they_are():
    meta = {name: weight.to("meta") for name, weight in J.items()}
    assert aligned(SMALL, meta, meta) == meta
