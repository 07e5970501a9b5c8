"""Parameters read a few experts at a time are, bit by bit, what transformers loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import models.stored_parameters
from models.checkpoints import load_model, save_model
from models.moe_layers import tensors_by_expert
from models.stored_parameters import StoredParameters
from models.tensor_files import INDEX, WEIGHTS, read_tensors, write_tensors
from moe_spec.errors import UserError
from tests.families.configs import tiny
from tests.models_table import EXPERTS, TINY

KEEP = (0, 3, 4, 7)

LAYOUTS = {
    "mixtral": "per expert, w1 w2 w3",
    "qwen3_moe": "per expert",
    "olmoe": "per expert",
    "deepseek_v3": "per expert, a selection bias",
    "gpt_oss": "stacked, biases",
    "granitemoe": "stacked, under other names",
    "phimoe": "per expert",
    "ernie4_5_moe": "a selection bias of one row",
    "gemma4": "stacked, a scale an expert",
    "vmoe": "stacked, as in the model",
}


@pytest.fixture(autouse=True)
def an_expert_at_a_time(monkeypatch):
    monkeypatch.setattr(models.stored_parameters, "PIECE_BYTES", 1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of every layout one in bfloat16, in shards."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in LAYOUTS:
        save_model(tiny(name).bfloat16(), root / name)
        write_tensors(read_tensors(root / name / WEIGHTS), root / name, shard_bytes=20_000)
        (root / name / WEIGHTS).unlink()
    return root


def joined(pieces):
    parts = list(pieces)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_pieces_make_what_the_loader_makes(name, dtype, checkpoints):
    model, stored = load_model(checkpoints / name, dtype), StoredParameters(checkpoints / name, dtype)
    by_expert, expected = tensors_by_expert(model), model.state_dict()
    assert set(stored) == set(expected)
    for parameter, value in expected.items():
        assert torch.equal(joined(stored.pieces(parameter, dtype=value.dtype)), value), parameter
    for parameter in by_expert:
        value = expected[parameter]
        kept = value[:, KEEP] if value.shape[0] == 1 else value[list(KEEP)]
        assert torch.equal(joined(stored.pieces(parameter, KEEP, value.dtype)), kept), parameter


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_expert_is_read_at_a_time(name, checkpoints):
    stored = StoredParameters(checkpoints / name, torch.float32)
    for layer in {layer.name: layer for layer in tensors_by_expert(tiny(name)).values()}.values():
        for parameter, values in layer.experts.named_parameters(recurse=False):
            pieces = list(stored.pieces(f"{layer.name}.experts.{parameter}"))
            assert [tuple(piece.shape) for piece in pieces] == [(1, *values.shape[1:])] * EXPERTS


def test_dropped_experts_are_never_read(checkpoints, tmp_path):
    expected = load_model(checkpoints / "olmoe").state_dict()
    save_model(TINY["olmoe"]().bfloat16(), tmp_path)
    write_tensors(read_tensors(tmp_path / WEIGHTS), tmp_path, shard_bytes=1)  # a file for each tensor
    (tmp_path / WEIGHTS).unlink()
    stored = StoredParameters(tmp_path, torch.float32)
    for parameter, path in json.loads((tmp_path / INDEX).read_text())["weight_map"].items():
        if any(f".experts.{dropped}." in parameter for dropped in set(range(EXPERTS)) - set(KEEP)):
            (tmp_path / path).unlink()
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(joined(stored.pieces(name, KEEP)), expected[name][list(KEEP)])


def test_values_of_another_shape_are_refused(tmp_path):
    save_model(TINY["vmoe"](), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "layers.1.mlp.experts.up_proj"
    save_file({**tensors, name: tensors[name].mT.contiguous()}, tmp_path / WEIGHTS)
    with pytest.raises(UserError) as refusal:
        list(StoredParameters(tmp_path, torch.float32).pieces(name))
    assert str(refusal.value) == (
        f"{tmp_path} has {name!r} in another shape than its config.json asks for\n"
        "hint: config.json and the weights must describe the same model; get the checkpoint again"
    )


def test_what_is_cut_into_several_parameters_is_not_read_one_by_one(tmp_path):
    save_model(tiny("step3p7"), tmp_path)
    with pytest.raises(UserError) as refusal:
        StoredParameters(tmp_path, torch.float32)
    assert str(refusal.value) == (
        f"{tmp_path} has 'model.vision_model.layers.0.self_attn.k_proj.bias' as a part of another tensor, "
        "which only the whole model is read from\nhint: leave out --device-map; the model must fit into memory"
    )
