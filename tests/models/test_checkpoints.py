import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from models.checkpoints import load_model, load_skeleton, save_model
from models.moe_layers import find_moe_layers
from models.tensor_files import INDEX, read_tensors, write_tensors
from moe_spec.errors import UserError
from tests.models_table import TINY, example_inputs
from tests.same_model import assert_same_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "mixtral"
    save_model(TINY["mixtral"](), directory)
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A checkpoint of its own, to be spoilt."""
    return shutil.copytree(saved, tmp_path / "mixtral")


def edit_config(checkpoint, **changes):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(load, checkpoint):
    with pytest.raises(UserError) as caught:
        load(checkpoint)
    return caught.value.what


@pytest.mark.parametrize("name", TINY)
def test_what_is_saved_is_loaded_again_without_a_word(name, tmp_path, capfd):
    model = TINY[name]()
    save_model(model, tmp_path / name)
    loaded = load_model(tmp_path / name)
    inputs = example_inputs(model, batch=2, sequence=5, seed=0)
    assert_same_model(loaded, model, lambda each: each(**inputs).logits)
    assert not loaded.training
    assert (tmp_path / name / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", TINY)
def test_a_skeleton_has_the_layers_and_no_weights(name, tmp_path):
    model = TINY[name]()
    save_model(model, tmp_path / name)
    skeleton = load_skeleton(tmp_path / name)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    described = [(layer.name, layer.num_experts, layer.top_k, layer.groups) for layer in find_moe_layers(skeleton)]
    assert described == [(layer.name, layer.num_experts, layer.top_k, layer.groups) for layer in find_moe_layers(model)]


def test_weights_are_cast_or_left_as_they_are(tmp_path):
    model = TINY["olmoe"]()
    save_model(model.bfloat16(), tmp_path / "olmoe")
    assert load_model(tmp_path / "olmoe").dtype == torch.float32
    assert load_model(tmp_path / "olmoe", dtype=None).dtype == torch.bfloat16


@pytest.mark.parametrize("load", [load_model, load_skeleton])
def test_what_is_no_checkpoint_is_refused(load, tmp_path):
    nowhere, empty = tmp_path / "nowhere", tmp_path / "empty"
    empty.mkdir()
    assert refusal(load, nowhere) == f"{nowhere} does not exist, expected a checkpoint directory"
    assert refusal(load, empty) == f"{empty} is no checkpoint: it has no config.json"
    (empty / "config.json").write_text("{}")
    assert refusal(load, empty) == f"{empty} holds no *.safetensors"


@pytest.mark.parametrize("load", [load_model, load_skeleton])
def test_pickled_weights_are_refused_unread(load, checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    expected = f"{checkpoint} holds pickled weights (pytorch_model.bin), which can run code when they are read"
    assert refusal(load, checkpoint) == expected


def test_a_cut_config_is_refused(checkpoint):
    path = checkpoint / "config.json"
    path.write_text(path.read_text()[:40])
    assert refusal(load_model, checkpoint).startswith(f"{path} is no complete JSON: ")
    path.write_text("[]")
    assert refusal(load_model, checkpoint) == f"{path} holds a list, expected a JSON object"
    path.write_text("{}")
    assert refusal(load_model, checkpoint) == f"{path} names no model_type"


def test_an_unknown_family_is_refused(checkpoint):
    edit_config(checkpoint, model_type="mystery")
    assert refusal(load_model, checkpoint) == "model_type 'mystery' is no MoE family that moe-edge knows"


def test_quantised_weights_are_refused(checkpoint):
    edit_config(checkpoint, quantization_config={"quant_method": "fp8"})
    assert refusal(load_model, checkpoint) == f"{checkpoint} holds quantised weights"


def test_weights_under_a_name_of_their_own_are_refused(checkpoint):
    edit_config(checkpoint, transformers_weights="other.safetensors")
    assert refusal(load_model, checkpoint) == f"{checkpoint / 'config.json'} names the file of its weights"


def test_a_config_that_fits_no_model_is_refused(checkpoint):
    edit_config(checkpoint, hidden_size="wide")
    expected = f"{checkpoint} cannot be loaded: Field 'hidden_size' expected int, got str (value: 'wide')"
    assert refusal(load_model, checkpoint) == expected


@pytest.mark.parametrize("load", [load_model, load_skeleton])
def test_numbers_that_make_no_model_are_refused(load, checkpoint):
    edit_config(checkpoint, num_key_value_heads=0)
    with pytest.raises(UserError, match=f"^{re.escape(str(checkpoint))} cannot be loaded: .* by zero") as caught:
        load(checkpoint)
    assert caught.value.hint == "look at the numbers in config.json; --debug shows where it failed"


def test_what_a_config_refuses_of_itself_is_said(tmp_path):
    save_model(TINY["vmoe"](), tmp_path)
    edit_config(tmp_path, moe_every=0)
    assert refusal(load_model, tmp_path) == f"{tmp_path} cannot be loaded: moe_every is 0, expected at least 1"


def test_cut_weights_are_refused_by_name(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(load_model, checkpoint).startswith(f"{path} is no complete safetensors file: ")


def test_lost_weights_are_never_made_up(checkpoint):
    edit_config(checkpoint, num_hidden_layers=3)
    expected = "weights that its config.json asks for, the first is 'model.layers.2.input_layernorm.weight'"
    assert expected in refusal(load_model, checkpoint)


@pytest.mark.parametrize("experts", [4, 9])
def test_another_number_of_experts_than_config_says_is_refused(experts, checkpoint):
    edit_config(checkpoint, num_local_experts=experts)
    assert refusal(load_model, checkpoint).startswith(f"{checkpoint} cannot be loaded: ")


def test_shards_may_be_links_as_they_are_in_the_cache_of_the_hub(tmp_path):
    model, blobs, snapshot = TINY["olmoe"](), tmp_path / "blobs", tmp_path / "snapshots" / "main"
    save_model(model, blobs)
    write_tensors(read_tensors(blobs / "model.safetensors"), blobs, shard_bytes=100_000)
    (blobs / "model.safetensors").unlink()
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    inputs = example_inputs(model, batch=2, sequence=5, seed=0)
    assert_same_model(load_model(snapshot), model, lambda each: each(**inputs).logits)


def test_an_index_stays_in_its_directory(checkpoint):
    index = checkpoint / INDEX
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../../elsewhere.safetensors"}}))
    name = "'../../elsewhere.safetensors'"
    assert refusal(load_model, checkpoint) == f"{index} names the file {name}, which lies outside {checkpoint}"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "lost.safetensors"}}))
    assert refusal(load_model, checkpoint) == f"{checkpoint / 'lost.safetensors'} is missing, {INDEX} names it"
    index.write_text('{"weight_map": {"lm_head.weight": 3}}')
    assert refusal(load_model, checkpoint) == f"{index} maps no weights to files"
    index.write_text("{")
    assert refusal(load_model, checkpoint).startswith(f"{index} is no complete JSON: ")
    index.unlink()
    expected = f"{checkpoint} has neither model.safetensors nor {INDEX}"
    assert refusal(load_model, checkpoint) == expected
