import json

import pytest

from models.checkpoints import load_skeleton, save_model, stored_tensors
from models.stored_names import is_cut, parameter_names
from models.tensor_files import Span, StoredTensor
from moe_spec.errors import UserError
from tests.families.configs import tiny
from tests.models_table import TINY

STORED = {
    "mixtral": ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "model.layers.0.mlp.experts.gate_up_proj"),
    "qwen3_moe": ("model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"),
    "olmoe": ("model.layers.0.mlp.experts.3.down_proj.weight", "model.layers.0.mlp.experts.down_proj"),
    "deepseek_v3": ("model.layers.0.mlp.experts.3.gate_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"),
    "gpt_oss": ("model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.0.mlp.experts.gate_up_proj_bias"),
    "granitemoe": (
        "model.layers.0.block_sparse_moe.input_linear.weight",
        "model.layers.0.block_sparse_moe.experts.gate_up_proj",
    ),
    "moe_bert": (
        "bert.encoder.layer.1.intermediate.experts.up_proj",
        "bert.encoder.layer.1.intermediate.experts.up_proj",
    ),
    "vmoe": ("layers.1.mlp.experts.up_proj", "layers.1.mlp.experts.up_proj"),
}
"""How published checkpoints name an expert's tensor, and where it goes."""


def names_of(checkpoint):
    return parameter_names(load_skeleton(checkpoint), stored_tensors(checkpoint), checkpoint)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_filled_by_what_is_stored(name, tmp_path):
    model = TINY[name]()
    save_model(model, tmp_path / name)
    assert set(names_of(tmp_path / name).values()) == model.state_dict().keys()


@pytest.mark.parametrize("name", STORED)
def test_published_names_lead_to_the_experts(name, tmp_path):
    save_model(TINY[name](), tmp_path / name)
    stored, parameter = STORED[name]
    assert names_of(tmp_path / name)[stored] == parameter


def test_a_language_model_read_as_a_bare_one_loses_its_prefix(tmp_path):
    save_model(TINY["olmoe"](), tmp_path / "olmoe")
    config = tmp_path / "olmoe/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["OlmoeModel"]}))
    names = names_of(tmp_path / "olmoe")
    assert names["model.layers.1.mlp.experts.0.up_proj.weight"] == "layers.1.mlp.experts.gate_up_proj"
    assert "lm_head.weight" not in names


def test_too_many_values_are_refused(tmp_path):
    save_model(TINY["olmoe"](), tmp_path)
    stored = stored_tensors(tmp_path)
    stored["model.layers.0.mlp.experts.8.up_proj.weight"] = StoredTensor("F32", (48, 32), (Span(tmp_path, 0, 6144),))
    with pytest.raises(UserError) as caught:
        parameter_names(load_skeleton(tmp_path), stored, tmp_path)
    assert (caught.value.what, caught.value.hint) == (
        f"{tmp_path} has 26,112 values for 'model.layers.0.mlp.experts.gate_up_proj', its config.json asks for 24,576",
        "config.json and the weights must describe the same model; get the checkpoint again",
    )


def test_a_stored_tensor_that_is_cut_into_several_parameters_is_known_by_its_family():
    assert [name for name in ("mixtral", "gpt_oss", "unlimited_ocr") if is_cut(tiny(name))] == ["unlimited_ocr"]


def test_a_part_that_is_missing_of_what_is_cut_into_several_is_missed(tmp_path):
    """Of the stored rows two thirds fill two of three parameters."""
    save_model(tiny("unlimited_ocr"), tmp_path)
    stored = stored_tensors(tmp_path)
    name = "model.vision_model.transformer.layers.0.self_attn.qkv_proj.bias"
    values = stored[name].size
    stored[name] = StoredTensor("F32", (values * 2 // 3,), stored[name].spans)
    with pytest.raises(UserError) as caught:
        parameter_names(load_skeleton(tmp_path), stored, tmp_path)
    first = "model.vision_tower.vision_encoder.encoder.layers.0.self_attn.q_proj.bias"
    assert caught.value.what == (
        f"{tmp_path} has {values * 2 // 3} values for {first!r}, its config.json asks for {values}"
    )
    del stored[name]
    with pytest.raises(UserError, match=r"lacks 3 weights that its config\.json asks for"):
        parameter_names(load_skeleton(tmp_path), stored, tmp_path)
