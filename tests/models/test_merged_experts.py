import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.merged_experts import MergedExperts, neurons_first
from models.moe_layers import find_moe_layers
from moe_spec.layer_plan import LayerPlan, Merge
from pruning.observe import expert_outputs
from tests.models_table import HIDDEN, TINY, WIDTH

BOTH = LayerPlan("layer", 2, 1, (0,), merge=(Merge((0, 1), (1, 3)),), align=True)
"""Expert 1 is merged into expert 0."""


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
@settings(max_examples=3)
@given(order=st.permutations(range(WIDTH)))
def test_permuted_neurons_compute_the_same_and_find_back(name, order):
    experts = experts_of(name)
    weights = weights_of(experts, 0)
    permuted = {key: weight.clone() for key, weight in weights.items()}
    for key, view in neurons_first(experts, permuted).items():
        view.copy_(neurons_first(experts, weights)[key][list(order)])
    merged = MergedExperts(experts, BOTH, lambda key, expert: (weights, permuted)[expert][key])
    assert all(torch.equal(merged.parameter(key, 0).float(), weights[key]) for key in weights)

    hidden_TH = torch.randn(4, HIDDEN)
    with torch.no_grad():
        for key, parameter in experts.named_parameters():
            parameter[1] = weights[key]
        expected = expert_outputs(experts, 1, hidden_TH)
        for key, parameter in experts.named_parameters():
            parameter[1] = permuted[key]
        torch.testing.assert_close(expert_outputs(experts, 1, hidden_TH), expected, rtol=0, atol=1e-5)
