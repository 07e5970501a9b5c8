import re

import pytest

from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256, checkpoint_weights, onnx_sha256


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for name in ("config.json", "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"):
        (directory / name).write_text(name)
    return directory


def test_a_checkpoint_is_its_config_and_its_weights(checkpoint):
    before = checkpoint_sha256(checkpoint)
    (checkpoint / "README.md").write_text("words change nothing")
    assert checkpoint_sha256(checkpoint) == before
    for name in ("config.json", "model-00002-of-00002.safetensors"):
        text = (checkpoint / name).read_text()
        (checkpoint / name).write_text("changed")
        assert checkpoint_sha256(checkpoint) != before
        (checkpoint / name).write_text(text)
    assert checkpoint_sha256(checkpoint) == before


def test_a_checkpoint_is_the_same_wherever_it_lies(checkpoint, tmp_path):
    before = checkpoint_sha256(checkpoint)
    assert checkpoint_sha256(checkpoint.rename(tmp_path / "elsewhere")) == before


def test_weights_come_by_name(checkpoint):
    assert [path.name[:11] for path in checkpoint_weights(checkpoint)] == ["model-00001", "model-00002"]


def test_safetensors_beside_pickles_are_enough(checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    assert len(checkpoint_weights(checkpoint)) == 2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"])
def test_pickles_alone_are_refused(name, checkpoint):
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    (checkpoint / name).write_bytes(b"")
    message = f"{checkpoint} holds pickled weights ({name}), which can run code when they are read"
    with pytest.raises(UserError, match=re.escape(message)):
        checkpoint_weights(checkpoint)


def test_an_onnx_model_is_its_file_and_the_data_beside_it(tmp_path):
    model, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    model.write_text("graph")
    alone = onnx_sha256(model)
    data.write_text("weights")
    together = onnx_sha256(model)
    data.write_text("other weights")
    assert len({alone, together, onnx_sha256(model)}) == 3


def test_files_that_an_onnx_model_names_are_part_of_it(tmp_path):
    model = tmp_path / "model.onnx"
    model.write_text("graph")
    (tmp_path / "model.onnx.data").write_text("weights")
    alone = onnx_sha256(model)
    assert onnx_sha256(model, ["model.onnx.data", "./model.onnx.data", "model.onnx", "not there"]) == alone
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "one").write_text("1")
    (tmp_path / "two").write_text("2")
    named = onnx_sha256(model, ["two", "parts/one"])
    assert named == onnx_sha256(model, ["parts/one", "two"]) != alone
    (tmp_path / "parts" / "one").write_text("3")
    assert onnx_sha256(model, ["two", "parts/one"]) not in (named, alone)


def test_a_file_elsewhere_is_no_part_of_a_model(tmp_path):
    model = tmp_path / "model" / "model.onnx"
    model.parent.mkdir()
    model.write_text("graph")
    message = f"{model} names the file '../secret', which lies outside {model.parent}"
    with pytest.raises(UserError, match=re.escape(message)):
        onnx_sha256(model, ["../secret"])
