import re
from typing import Any

import pytest

from models.families import FAMILIES, family
from models.moe_layers import find_moe_layers
from moe_spec import Groups, UserError
from tests.models_table import EXPERTS, TINY, TOP_K


def test_every_family_has_a_tiny_model():
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_a_row_names_what_the_model_has(name):
    model, row = TINY[name](), family(name)
    config = model.config.to_dict()
    assert (config["model_type"], config[row.experts_key], config[row.top_k_key]) == (name, EXPERTS, TOP_K)
    layers = find_moe_layers(model)
    assert len(layers) == 2
    for layer in layers:
        assert (layer.num_experts, layer.top_k) == (EXPERTS, TOP_K)
        assert (getattr(layer.router, row.experts_count), getattr(layer.experts, row.experts_count)) == (8, 8)
        tensors = {key: value for key, value in layer.router.state_dict().items() if value.shape[0] == EXPERTS}
        assert set(tensors) == set(row.router_tensors) == set(layer.router.state_dict())
        assert {parameter.shape[0] for parameter in layer.experts.parameters()} == {EXPERTS}
        assert model.get_submodule(layer.name) is not layer.router


def test_groups_are_found_in_config_and_router():
    model, row = TINY["deepseek_v3"](), family("deepseek_v3")
    assert [layer.groups for layer in find_moe_layers(model)] == [Groups(2, 1)] * 2
    row.set_config_counts(model.config, 6, 1, Groups(3, 2))
    config = model.config.to_dict()
    assert row.group_keys is not None
    assert [config[key] for key in (row.experts_key, row.top_k_key, *row.group_keys)] == [6, 1, 3, 2]


def test_the_layers_come_in_model_order_without_the_dense_ones():
    assert [layer.name for layer in find_moe_layers(TINY["vmoe"]())] == ["layers.1.mlp", "layers.3.mlp"]


def test_an_unknown_family_is_refused_with_the_nearest():
    known = "deepseek_v3, gpt_oss, granitemoe, mixtral, olmoe, qwen3_moe, vmoe"
    with pytest.raises(UserError) as caught:
        family("mixtrl")
    assert caught.value.what == "model_type 'mixtrl' is no MoE family that moe-edge knows"
    assert caught.value.hint == f"did you mean 'mixtral'? known: {known}"


def test_a_model_without_experts_is_refused():
    model: Any = TINY["vmoe"]()
    del model.layers[1], model.layers[2]
    message = "the vmoe model has no MoE layer: none of its modules holds 'router' and 'experts'"
    with pytest.raises(UserError, match=re.escape(message)):
        find_moe_layers(model)
