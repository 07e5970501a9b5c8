import re
from typing import Any

import pytest

from models.families import FAMILIES, GROUP_KEYS, family
from models.moe_layers import find_moe_layers, set_top_k
from moe_spec.errors import UserError
from moe_spec.feasibility import Groups
from tests.families.configs import CONFIGS, tiny
from tests.models_table import EXPERTS, HIDDEN, TINY, TOP_K


def test_every_family_has_a_tiny_model():
    assert {*CONFIGS, *TINY} == set(FAMILIES)
    assert not {*CONFIGS} & {*TINY}
    assert list(FAMILIES) == sorted(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_names_what_the_model_has(name):
    model, row = tiny(name), family(name)
    assert family(model.config.model_type) is row
    config = row.counts(model.config).to_dict()
    top_k = TOP_K if row.top_k_key else 1
    assert (config[row.experts_key], config.get(row.top_k_key, 1)) == (EXPERTS, top_k)
    layers = find_moe_layers(model)
    assert len(layers) == (4 if name == "ernie4_5_vl_moe" else 2)  # it has experts for words and others for images
    for layer in layers:
        assert (layer.num_experts, layer.top_k, layer.hidden_size) == (EXPERTS, top_k, HIDDEN)
        there = model.get_submodule(layer.name).state_dict()
        tensors = {key: value for key, value in there.items() if key.startswith((f"{row.router}.", *row.block_tensors))}
        of_experts = {key for key, value in tensors.items() if EXPERTS in value.shape}
        assert of_experts == set(row.routing_tensors)
        assert there[row.routing_tensors[0]].shape == (EXPERTS, HIDDEN)
        assert {parameter.shape[0] for parameter in layer.experts.parameters(recurse=False)} == {EXPERTS}


def test_groups_are_found_in_config_and_router():
    model, row = TINY["deepseek_v3"](), family("deepseek_v3")
    assert [layer.groups for layer in find_moe_layers(model)] == [Groups(2, 1)] * 2
    row.set_config_counts(model.config, 6, 1, Groups(3, 2))
    config = model.config.to_dict()
    assert [config[key] for key in (row.experts_key, row.top_k_key, *GROUP_KEYS)] == [6, 1, 3, 2]


def test_greedy_routers_have_no_groups_whatever_their_config_says():
    model: Any = tiny("deepseek_v2")
    assert [layer.groups for layer in find_moe_layers(model)] == [Groups(2, 1, scored_by=1)] * 2
    for layer in find_moe_layers(model):
        model.get_submodule(layer.name).gate.topk_method = "greedy"
    assert [layer.groups for layer in find_moe_layers(model)] == [None] * 2


@pytest.mark.parametrize(
    ("name", "score"), [("cohere2_moe", "softmax"), ("deepseek_v4", "sqrtsoftplus"), ("flint", "sigmoid")]
)
def test_the_score_is_what_the_config_says_or_the_family(name, score):
    assert {layer.score for layer in find_moe_layers(tiny(name))} == {score}


@pytest.mark.parametrize("name", ["gemma4", "olmoe", "openai_privacy_filter"])
def test_top_k_is_set_for_one_layer_and_no_other(name):
    model = tiny(name)
    set_top_k(model, find_moe_layers(model)[1], 1)
    assert [layer.top_k for layer in find_moe_layers(model)] == [TOP_K, 1]
    assert getattr(model.config, family(name).top_k_key) == TOP_K


def test_a_router_that_always_selects_two_is_not_told_to_select_one():
    model = tiny("phimoe")
    layer = find_moe_layers(model)[0]
    message = (
        "every router of a phimoe model selects K=2 experts, so layer model.layers.0.mlp cannot select 1\n"
        "hint: keep at least 2 experts in every layer"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        set_top_k(model, layer, 1)
    set_top_k(model, layer, 2)


def test_the_layers_come_in_model_order_without_the_dense_ones():
    assert [layer.name for layer in find_moe_layers(TINY["vmoe"]())] == ["layers.1.mlp", "layers.3.mlp"]


@pytest.mark.parametrize(("word", "nearest"), [("mixtrl", "did you mean 'mixtral'? "), ("resnet", "")])
def test_an_unknown_family_is_refused_with_the_nearest(word, nearest):
    message = (
        f"model_type {word!r} is no MoE family that moe-edge knows\n"
        f"hint: {nearest}`moe-edge families` lists them; any other module is adapted in a few lines of Python: "
        "docs/howto/any-torch-module.md; CONTRIBUTING.md says how to add a family"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        family(word)


def test_a_model_without_experts_is_refused():
    model: Any = TINY["vmoe"]()
    del model.layers[1], model.layers[2]
    message = "the vmoe model has no MoE layer: none of its modules holds 'router' and 'experts'"
    with pytest.raises(UserError, match=re.escape(message)):
        find_moe_layers(model)
