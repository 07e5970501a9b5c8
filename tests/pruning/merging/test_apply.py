import copy
import dataclasses
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.checkpoints import load_model, save_model
from models.families import family
from models.merged_experts import neurons_first
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import ALIAS, MEAN, NEW, ROWS, LayerPlan, Merge
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from pruning.prune import prune
from tests.families.configs import tiny
from tests.models_table import TINY, WIDTH, auto_class, example_inputs
from tests.oracle import plan_for
from tests.pruning.merging.plans import merging
from tests.same_model import assert_same_model

RENORMALISED = [name for name in TINY if name not in ("olmoe", "vmoe")]
"""Families whose gates add up to the same number whoever is selected."""


def logits(model):
    with torch.no_grad():
        return model(**example_inputs(model, batch=3, sequence=6, seed=0)).logits


def experts_of(model):
    return [dict(layer.experts.named_parameters()) for layer in find_moe_layers(model)]


def routers_of(model):
    names = family(model.config.model_type).router_tensors
    return [{name: operator.attrgetter(name)(layer.router) for name in names} for layer in find_moe_layers(model)]


def test_the_worked_means():
    model = TINY["vmoe"]()
    for stacked in experts_of(model):
        for parameter in stacked.values():
            for expert, value in enumerate((1.0, 5.0, 2.0, 4.0)):
                parameter.data[expert] = value
    layer = LayerPlan("layers.1.mlp", 8, 2, (0, 2), merge=(Merge((0, 1), (3, 1)), Merge((2, 3), (2, 2))), align=True)
    apply_plan(model, PruningPlan("", "uncurl", (layer,)))
    for parameter in experts_of(model)[0].values():
        assert [parameter[expert].unique().tolist() for expert in range(2)] == [[2.0], [3.0]]


@pytest.mark.parametrize("name", TINY)
def test_rows_that_share_an_expert_give_their_gates_to_it(name):
    """The router chooses as ever; whoever it chose of a group, the survivor answers, which is the mean."""
    model, shared, merged = (TINY[name]() for _ in range(3))
    plan = merging(model, router=ALIAS)
    apply_plan(shared, plan)
    assert shared.config.to_dict() == model.config.to_dict()
    apply_plan(merged, merging(model))
    survivor_of = torch.arange(8)
    for own, merge in zip(plan.layers[0].keep, plan.layers[0].merge, strict=True):
        survivor_of[list(merge.experts)] = own
    for layer, means in zip(find_moe_layers(model), experts_of(merged), strict=True):
        for key, parameter in layer.experts.named_parameters():
            parameter.data[list(plan.layers[0].keep)] = means[key].data
        layer.experts.register_forward_pre_hook(lambda _, args: (args[0], survivor_of[args[1]], args[2]))
    torch.testing.assert_close(logits(shared), logits(model))
    assert (logits(shared) - logits(TINY[name]())).abs().max() > 1e-3


def test_a_checkpoint_has_an_expert_a_row(tmp_path):
    model = TINY["mixtral"]()
    save_model(model, tmp_path / "mixtral")
    plan = dataclasses.replace(merging(model, router=ALIAS), model_sha256=checkpoint_sha256(tmp_path / "mixtral"))
    plan.save(tmp_path / "plan.json")
    with pytest.raises(UserError) as caught:
        prune(tmp_path / "mixtral", tmp_path / "plan.json", tmp_path / "out")
    assert (caught.value.what, caught.value.hint) == (
        "the plan lets rows of the router of layer model.layers.0.mlp share an expert, but a checkpoint has one for "
        "each row",
        "moe-edge export CHECKPOINT -o exported/ && moe-edge optimize exported/ --plan plan.json -o optimized/",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_a_merge_in_which_only_the_survivor_counts_is_a_drop(name, align):
    merged, dropped = TINY[name](), TINY[name]()
    plan = merging(merged, weights=(0.0, 5.0), align=align)
    apply_plan(merged, plan)
    apply_plan(dropped, plan_for(dropped, {layer.name: layer.keep for layer in plan.layers}))
    assert merged.config.to_dict() == dropped.config.to_dict()
    expected = dropped.state_dict()
    assert merged.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in merged.state_dict().items())


@pytest.mark.parametrize("name", TINY)
@settings(max_examples=2)
@given(order=st.permutations(range(WIDTH)))
def test_an_expert_whose_neurons_are_permuted_merges_into_what_it_was(name, order):
    model, (first, second) = TINY[name](), (0, 2)
    plan = merging(model, ((first, second), (1, 3), (4, 7), (5, 6)), survivor=-1)
    expected = []
    for layer in find_moe_layers(model):
        stacked = dict(layer.experts.named_parameters())
        weights = {key: parameter.data[second] for key, parameter in stacked.items()}
        permuted = {key: weight.clone() for key, weight in weights.items()}
        for key, view in neurons_first(layer.experts, permuted).items():
            view.copy_(neurons_first(layer.experts, weights)[key][list(order)])
        for key, parameter in stacked.items():
            parameter.data[first] = permuted[key]
        expected.append({key: weight.clone() for key, weight in weights.items()})
    apply_plan(model, plan)
    place = plan.layers[0].keep.index(second)
    for stacked, weights in zip(experts_of(model), expected, strict=True):
        assert all(torch.equal(parameter[place], weights[key]) for key, parameter in stacked.items())


@pytest.mark.parametrize("router", [ROWS, MEAN, NEW])
@pytest.mark.parametrize("name", RENORMALISED)
def test_identical_experts_merge_into_a_model_that_computes_the_same(name, router):
    model = TINY[name]()
    for stacked in experts_of(model):
        for parameter in stacked.values():
            parameter.data[:] = parameter.data[:1]
    expected = logits(model)
    apply_plan(model, merging(model, router=router))
    assert [layer.num_experts for layer in find_moe_layers(model)] == [4, 4]
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["olmoe", "vmoe"])
def test_where_gates_do_not_add_up_to_one_they_grow_with_every_merge(name):
    model = TINY[name]()
    for stacked, router in zip(experts_of(model), routers_of(model), strict=True):
        for parameter in [*stacked.values(), router["weight"]]:
            parameter.data[:] = parameter.data[:1]
    half = copy.deepcopy(model)  # K of E gates of 1/E each: half as many experts give twice as much
    apply_plan(model, merging(model))
    for stacked in experts_of(half):
        for key, parameter in stacked.items():
            parameter.data *= 2 if key.startswith("down") else 1
    torch.testing.assert_close(logits(model), logits(half), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_weights_and_rows_are_weighted_means(name):
    model, merged = TINY[name](), TINY[name]()
    plan = merging(model, router=MEAN, align=False)
    apply_plan(merged, plan)
    before = [*experts_of(model), *routers_of(model)]
    after = [*experts_of(merged), *routers_of(merged)]
    for old, new in zip(before, after, strict=True):
        for key, tensor in old.items():
            old_E = tensor.detach().double().numpy()
            expected = [
                (old_E[first] + 3 * old_E[second]) / 4
                for first, second in (merge.experts for merge in plan.layers[0].merge)
            ]
            np.testing.assert_array_equal(new[key].detach().numpy(), np.stack(expected).astype(np.float32))


def test_half_precision_is_rounded_once():
    model = TINY["mixtral"]().bfloat16()
    merged = copy.deepcopy(model)
    apply_plan(merged, merging(model, align=False))
    for old, new in zip(experts_of(model), experts_of(merged), strict=True):
        for key, parameter in old.items():
            first, second = parameter.detach().double()[[0, 2]]
            assert new[key].dtype == torch.bfloat16
            assert torch.equal(new[key][0], ((first + 3 * second) / 4).bfloat16())


def assert_drawn(routers, config):
    """Rows are as small as a new model's, a tenth of those of the tiny models, and no selection bias is left."""
    for router in routers:
        assert 0.5 < router["weight"].std() / config.initializer_range < 2
        assert not router.get("e_score_correction_bias", torch.zeros(1)).any()


@pytest.mark.parametrize("name", TINY)
def test_new_rows_are_drawn_like_those_of_a_new_model_and_repeat_with_their_seed(name):
    routers = []
    state = torch.random.get_rng_state()
    for seed in (0, 0, 1):
        model = TINY[name]()
        state = torch.random.get_rng_state()
        apply_plan(model, merging(model, router=NEW, align=False, seed=seed))
        assert torch.equal(torch.random.get_rng_state(), state)
        routers.append(routers_of(model))
    first, again, other = routers
    for key in first[0]:
        assert first[0][key].shape[0] == 4
        assert torch.equal(first[0][key], again[0][key])
    assert not torch.equal(first[0]["weight"], other[0]["weight"])
    assert not torch.equal(first[0]["weight"], first[1]["weight"])
    assert_drawn(first, model.config)


def test_the_language_model_within_a_model_draws_its_rows():
    model = tiny("ernie4_5_vl_moe")
    apply_plan(model, merging(model, router=NEW, align=False))
    assert_drawn(routers_of(model), model.config.get_text_config())


@pytest.mark.parametrize("router", [ROWS, MEAN, NEW])
@pytest.mark.parametrize("name", TINY)
def test_a_merged_checkpoint_loads_with_auto_classes(name, router, tmp_path, monkeypatch):
    checkpoint, out = tmp_path / name, tmp_path / "merged"
    save_model(TINY[name](), checkpoint)
    model = load_model(checkpoint)
    plan = dataclasses.replace(merging(model, router=router), model_sha256=checkpoint_sha256(checkpoint))
    plan.save(tmp_path / "plan.json")
    with monkeypatch.context() as patched:
        patched.setattr("pruning.prune.load_model", None)  # the model is never in memory
        prune(checkpoint, tmp_path / "plan.json", out)
    apply_plan(model, plan)
    merged = auto_class(model).from_pretrained(out, local_files_only=True)
    assert [layer.num_experts for layer in find_moe_layers(merged)] == [4, 4]
    assert_same_model(merged, model, logits)
    assert PruningPlan.load(out / "plan.json") == plan
    if router == NEW:
        assert_drawn(routers_of(merged), merged.config)


def test_a_seed_that_is_none_is_refused():
    model = TINY["mixtral"]()
    with pytest.raises(UserError) as caught:
        apply_plan(model, merging(model, router=NEW, seed="lucky"))
    assert caught.value.what == "the plan's seed is 'lucky', expected an int from 0"
    assert caught.value.hint == "make it again with `moe-edge plan`"


WAYS = {
    MEAN: "prune the ONNX graph, which has no such limit: moe-edge optimize exported/ --plan plan.json",
    NEW: "merge into as many experts in every layer and every group: moe-edge plan --scope layer, and more --keep",
}


@pytest.mark.parametrize("router", WAYS)
def test_a_checkpoint_cannot_hold_layers_that_were_merged_into_different_numbers(router, tmp_path):
    checkpoint = tmp_path / "mixtral"
    save_model(TINY["mixtral"](), checkpoint)
    plan = merging(TINY["mixtral"](), router=router)
    plan = dataclasses.replace(plan, model_sha256=checkpoint_sha256(checkpoint), layers=plan.layers[:1])
    plan.save(tmp_path / "plan.json")
    with pytest.raises(UserError) as caught:
        prune(checkpoint, tmp_path / "plan.json", tmp_path / "out")
    assert caught.value.what == (
        f"the plan leaves different counts in the layers of {checkpoint} (model.layers.0.mlp: 4 (K=2), "
        "model.layers.1.mlp: 8 (K=2)), but a checkpoint's config.json has one for all of them"
    )
    assert caught.value.hint == WAYS[router]


@pytest.mark.parametrize("router", WAYS)
def test_groups_that_a_torch_router_cannot_have_are_refused(router):
    model = TINY["deepseek_v3"]()
    with pytest.raises(UserError) as caught:
        apply_plan(model, merging(model, ((0, 2), (1, 3), (4, 7)), weights=(1.0, 1.0), router=router))
    assert caught.value.what == (
        "layer model.layers.0.mlp keeps [2, 1] experts in its 2 routing groups, but a torch router needs the same "
        "number in each, at least 2"
    )
    assert caught.value.hint == WAYS[router]
