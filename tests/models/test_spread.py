import json

import pytest
import torch

from models.checkpoints import load_model, save_model
from models.spread import load_spread, parse_memory
from models.stored_parameters import StoredParameters
from models.tensor_files import StoredTensor, read_tensors, write_tensors
from moe_spec.errors import UserError
from tests.models_table import TINY, example_inputs


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("memory", ["0MB", "40KB", "150KB", "1GB"])
def test_a_model_larger_than_memory_computes_what_it_computes_in_memory(name, memory, zoo, capfd):
    checkpoint = zoo.checkpoint(name)
    whole = load_model(checkpoint)
    before = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    capfd.readouterr()
    spread = load_spread(checkpoint, max_memory=memory)
    assert any(parameter.is_meta for parameter in spread.parameters()) == (memory != "1GB")  # these wait on the disk
    assert not spread.training
    inputs = example_inputs(whole, batch=2, sequence=5, seed=0)
    for implementation in ("eager", "batched_mm"):
        for model in (whole, spread):
            model.set_experts_implementation(implementation)
        with torch.no_grad():
            torch.testing.assert_close(spread(**inputs).logits, whole(**inputs).logits)
    assert {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()} == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", TINY)
def test_a_stored_parameter_is_what_the_loader_makes_of_it(name, zoo):
    stored, model = StoredParameters(zoo.checkpoint(name), torch.float32), load_model(zoo.checkpoint(name))
    expected = model.state_dict()
    assert list(stored) == list(expected)
    for parameter, value in expected.items():
        for _ in range(2):
            assert torch.equal(stored[parameter], value)
    assert "model.embed_tokens" not in stored


def test_values_are_cast(tmp_path):
    save_model(TINY["olmoe"]().bfloat16(), tmp_path)
    stored = StoredParameters(tmp_path, torch.float32)["model.layers.1.mlp.experts.down_proj"]
    expected = load_model(tmp_path).get_parameter("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("memory", ["0MB", "1GB"])
def test_tied_weights_are_one(memory, tmp_path):
    model = TINY["olmoe"]()
    model.config.tie_word_embeddings = True
    model = type(model)(model.config)
    save_model(model, tmp_path)
    assert "lm_head.weight" not in read_tensors(tmp_path / "model.safetensors")
    inputs = example_inputs(model, batch=2, sequence=5, seed=0)
    with torch.no_grad():
        expected = load_model(tmp_path)(**inputs).logits
        torch.testing.assert_close(load_spread(tmp_path, max_memory=memory)(**inputs).logits, expected)


def test_a_weight_of_another_shape_is_refused(tmp_path):
    save_model(TINY["olmoe"](), tmp_path / "whole")
    tensors = read_tensors(tmp_path / "whole/model.safetensors")
    name = "model.layers.0.self_attn.q_norm.weight"
    tensors[name] = StoredTensor("F32", (2, 16), tensors[name].spans)
    (tmp_path / "turned").mkdir()
    write_tensors(tensors, tmp_path / "turned")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    (tmp_path / "turned/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load_spread(tmp_path / "turned", max_memory="1GB")
    assert caught.value.what == f"{tmp_path / 'turned'} has {name!r} in another shape than its config.json asks for"


def test_an_unknown_device_map_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        load_spread(tmp_path, "autp")
    assert caught.value.what == "'autp' is no device map"
    assert caught.value.hint == "did you mean 'auto'? known: auto, balanced, sequential"


def test_memory_is_read_with_its_unit():
    assert (parse_memory("4GB"), parse_memory("900MB"), parse_memory("1GiB")) == (4 * 10**9, 9 * 10**8, 2**30)
    assert (parse_memory("4gb"), parse_memory("900Mb"), parse_memory("1gib")) == (4 * 10**9, 9 * 10**8, 2**30)


@pytest.mark.parametrize("text", ["much", "infGB", "nanGB", "-1GB", "GB", ""])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(UserError) as caught:
        parse_memory(text)
    assert (caught.value.what, caught.value.hint) == (
        f"--max-memory {text} is no amount of memory",
        "for example 4GB, 900MB or 4GiB",
    )
