"""What is read from files is what the loaded model holds."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pruning.stored_weights
from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from pruning.stored_weights import StoredWeights
from tests.models_table import TINY


def save_fused(model, directory):
    """One tensor for all experts of a layer, as transformers 5 has them in memory."""
    model.save_pretrained(directory, save_original_format=False)


def save_half(model, directory):
    save_model(model.bfloat16(), directory)


def read(weights, layer):
    """Every value of every expert, in no order."""
    pieces = defaultdict(list)
    for expert, piece in weights.experts(layer):
        assert piece.dtype == np.float64
        pieces[expert].append(piece)
    return [np.sort(np.concatenate(pieces[expert])) for expert in range(layer.num_experts)]


@pytest.mark.parametrize("save", [save_model, save_fused, save_half])
@pytest.mark.parametrize("name", TINY)
def test_routers_and_matrices_of_experts_are_those_of_the_model(name, save, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning.stored_weights, "_PIECE", 1000)
    save(TINY[name](), tmp_path / name)
    weights = StoredWeights(tmp_path / name)
    layers = find_moe_layers(load_model(tmp_path / name, dtype=torch.float64))
    assert [layer.name for layer in weights.layers] == [layer.name for layer in layers]
    for stored, loaded in zip(weights.layers, layers, strict=True):
        np.testing.assert_array_equal(weights.router(stored), loaded.router.get_parameter("weight").detach())
        matrices = [one.detach().flatten(1) for one in loaded.experts.parameters() if one.dim() > 2]
        expected_EN = np.sort(torch.cat(matrices, dim=1).numpy(), axis=1)
        np.testing.assert_array_equal(read(weights, stored), expected_EN)


def test_an_expert_that_is_not_there_is_refused(tmp_path):
    save_model(TINY["qwen3_moe"](), tmp_path / "cut")
    path, name = tmp_path / "cut" / "model.safetensors", "model.layers.1.mlp.experts.{}.up_proj.weight"
    stored = load_file(path)
    stored[name.format(8)] = stored.pop(name.format(3))
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        StoredWeights(tmp_path / "cut")
    assert caught.value.what == (
        f"{tmp_path / 'cut'} has model.layers.1.mlp.experts.*.up_proj.weight for the experts "
        "[0, 1, 2, 4, 5, 6, 7, 8], expected 0 to 7"
    )
