"""Modules of no family: what adapters make of them is calibrated, planned and pruned like any model."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from models.moe_block import SparseMoe, StackedExperts, TopKRouter
from models.moe_layers import find_moe_layers
from models.plain import plain_model
from moe_spec.errors import UserError
from moe_spec.plan import PruningPlan
from moe_spec.statistics import Statistics
from pruning.apply import apply_plan
from pruning.collect import collect
from pruning.options import PlanOptions
from pruning.plan import plan
from tests.oracle import masked, plan_for
from tests.plain_modules import ADAPTERS, EXPERTS, HIDDEN, adapted_net, example, home_made_adapter, net

every_module = pytest.mark.parametrize("name", ADAPTERS)


def outputs(model):
    with torch.no_grad():
        return model(**example(3, 7))


@every_module
def test_an_adapted_module_computes_what_it_computed(name):
    own, model = net(name).eval(), adapted_net(name)
    with torch.no_grad():
        expected = own(**example(3, 7))
    for wanted, got in zip(expected, outputs(model).values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    layers = find_moe_layers(model)
    assert [layer.name for layer in layers] == ["module.blocks.0", "module.blocks.1"]
    assert {(layer.num_experts, layer.top_k, layer.hidden_size) for layer in layers} == {(EXPERTS, 2, HIDDEN)}


@every_module
def test_it_is_calibrated_planned_and_pruned(name, tmp_path):
    model = adapted_net(name)
    layers = collect(model, [example(2, 9), example(1, 4)])
    assert all(layer["tokens"].sum() == 2 * layer.token_count == 44 for layer in layers)
    Statistics(model.sha256(), (), layers).save(tmp_path / "statistics.safetensors")
    made = plan(tmp_path / "statistics.safetensors", PlanOptions(keep=3), tmp_path / "plan.json")
    made.require_model(model.sha256(), "the module")
    with masked(model, made):
        expected = outputs(model)
    apply_plan(model, PruningPlan.load(tmp_path / "plan.json"))
    assert {layer.num_experts for layer in find_moe_layers(model)} == {3}
    for key, got in outputs(model).items():
        torch.testing.assert_close(got, expected[key], rtol=1e-5, atol=1e-5)


def test_layers_may_keep_different_numbers():
    model, whole = adapted_net("MoE"), adapted_net("MoE")
    made = plan_for(model, {"module.blocks.0": (1, 4), "module.blocks.1": (0, 2, 5)})
    apply_plan(model, made)
    with masked(whole, made):
        np.testing.assert_allclose(outputs(model)["scores"], outputs(whole)["scores"], rtol=1e-5, atol=1e-5)


def test_a_hash_tells_weights_apart():
    one, other = adapted_net("MoE"), adapted_net("MoE")
    assert one.sha256() == other.sha256()
    with torch.no_grad():
        next(other.parameters())[0] += 1
    assert one.sha256() != other.sha256()


def test_a_hash_counts_tensors_of_one_number():
    """As BatchNorm holds one."""
    hashes = set()
    for count in (3, 4):
        model = adapted_net("MoE")
        model.module.register_buffer("num_batches_tracked", torch.tensor(count))
        hashes.add(model.sha256())
    assert len(hashes) == 2


def renormalised_not(block):
    adapted = home_made_adapter(block)
    adapted.router.renormalize = False
    return adapted


def swapped(block):
    adapted = home_made_adapter(block)
    experts = adapted.experts
    up_ENH = torch.cat(experts.gate_up_proj.detach().chunk(2, dim=1)[::-1], dim=1)
    experts.gate_up_proj = nn.Parameter(up_ENH)
    return adapted


@pytest.mark.parametrize("wrong", [renormalised_not, swapped])
def test_an_adapter_that_computes_something_else_is_refused(wrong):
    message = (
        r"with its blocks adapted the module gives another output: it differs by \S+ of its range, allowed is 1e-05\n"
        "hint: an adapter computes what its block computes in eval mode: look at the order of gate and up, at "
        "renormalize, at biases, and at tokens that a full expert drops"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        plain_model(net("HomeMade"), {"HomeMade": wrong}, example)


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ({"MixtureOfExperts": home_made_adapter}, "none of the modules is a 'MixtureOfExperts'"),
        ({}, "no class of blocks is named"),
    ],
)
def test_a_class_that_is_not_there_is_refused_with_those_that_are(blocks, reason):
    there = "Expert, HomeMade, LayerNorm, Linear, ModuleList, Net"
    message = re.escape(f"{reason}\nhint: the classes of its modules are {there}")
    with pytest.raises(UserError, match=f"^{message}$"):
        plain_model(net("HomeMade"), blocks, example)


def test_more_names_than_results_are_refused():
    message = re.escape("the module gives 2 results, but 3 outputs are named\nhint: name 2 at most")
    with pytest.raises(UserError, match=f"^{message}$"):
        plain_model(net("HomeMade"), {"HomeMade": home_made_adapter}, example, outputs=("a", "b", "c"))


def test_the_three_lines_of_the_documents_do():
    net = nn.Sequential(nn.Linear(4, 4), Small())

    def adapt(block):
        up_ENH, down_EHF = (torch.stack([getattr(one, name).weight for one in block.experts]) for name in ("w1", "w2"))
        experts = StackedExperts(up_ENH, down_EHF, nn.functional.relu, gated=False)
        return SparseMoe(TopKRouter(block.gate.weight, top_k=2), experts)

    model = plain_model(net, {"Small": adapt}, lambda batch, length: {"input": torch.randn(batch, length, 4)})
    assert [layer.num_experts for layer in find_moe_layers(model)] == [3]


class SmallExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.w2(self.w1(x).relu())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3, bias=False), nn.ModuleList(SmallExpert() for _ in range(3))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(dim=-1).topk(2, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        picked = every.gather(-2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
        return (picked * weights[..., None]).sum(dim=-2)
