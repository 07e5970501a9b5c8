"""What is bound is, bit by bit, what transformers loads; where it lies is said and hashed."""

import contextlib
import dataclasses
import itertools
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from exporter import bind
from exporter.bind import bytes_of, nbytes, save
from exporter.fold import evaluate
from exporter.sources import pieces_of
from exporter.tasks import task_of
from exporter.trace import trace
from exporter.weightless import weightless
from models.checkpoints import load_empty, load_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.external_data import ALIGNMENT, INLINE_BYTES
from moe_spec.files import sha256_file
from moe_spec.manifest import MODEL
from tests.heard import Heard
from tests.models_table import TINY


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_weight_of_the_graph_is_the_one_that_transformers_loads(name, zoo, tmp_path):
    exported = shutil.copytree(zoo.exported(name), tmp_path / "exported")  # onnx refuses a file that others link to
    state = {key: value.numpy() for key, value in load_model(zoo.checkpoint(name)).state_dict().items()}
    bound = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(exported / MODEL).graph.initializer}
    transposed = {key.removesuffix(".transpose"): value.T for key, value in bound.items() if key.endswith(".transpose")}
    vectors = {key.removesuffix(".reshape"): value.ravel() for key, value in bound.items() if key.endswith(".reshape")}
    read = transposed | vectors | {key: value for key, value in bound.items() if key in state}
    assert set(read) == set(state)
    for key, value in read.items():
        np.testing.assert_array_equal(value, state[key], strict=True)


@pytest.fixture(scope="module")
def model(zoo):
    return load_empty(zoo.checkpoint("vmoe"), torch.float32)


@pytest.fixture(scope="module")
def traced(model):
    """Of a model that has no values."""
    return trace(model, task_of(type(model).__name__), find_moe_layers(model), 20)


@pytest.fixture(scope="module")
def pieces(zoo):
    return pieces_of(load_model(zoo.checkpoint("vmoe")))


def test_a_trace_has_names_and_shapes_and_no_values(traced, model):
    weights = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert {key: list(tensor.dims) for key, tensor in traced.parameters.items()} == weights
    assert not any(tensor.raw_data for tensor in traced.proto.graph.initializer if tensor.name in weights)


def test_a_model_has_its_weights_again_whatever_happens(model):
    before = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    with contextlib.suppress(KeyboardInterrupt), weightless(model, torch.float32):
        assert {value.device.type for value in model.parameters()} == {"cpu"}
        raise KeyboardInterrupt
    assert {key: id(value) for key, value in model.state_dict(keep_vars=True).items()} == before


def test_weights_lie_in_the_order_in_which_they_are_read(traced, pieces, tmp_path):
    hashes = save(traced, pieces, tmp_path / "g.onnx")
    assert hashes == {"g.onnx.data": sha256_file(tmp_path / "g.onnx.data")}
    graph = onnx.load(tmp_path / "g.onnx", load_external_data=False).graph
    read = list(dict.fromkeys(name for node in graph.node for name in node.input))
    names = [tensor.name for tensor in graph.initializer]
    assert names == [name for name in read if name in names]
    end = 0
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "g.onnx.data"
            assert int(place["offset"]) == end + -end % ALIGNMENT
            end = int(place["offset"]) + int(place["length"])
            assert int(place["length"]) == nbytes(tensor) >= INLINE_BYTES
    assert (tmp_path / "g.onnx.data").stat().st_size == end


def test_progress_is_told_after_each_weight(traced, pieces, tmp_path):
    heard = Heard()
    save(traced, pieces, tmp_path / "g.onnx", on_progress=heard)
    weights = onnx.load(tmp_path / "g.onnx", load_external_data=False).graph.initializer
    sums = itertools.accumulate(map(nbytes, weights))
    assert heard.counts("writing weights") == [(done, sum(map(nbytes, weights))) for done in sums]


def test_all_weights_may_lie_in_the_onnx_file(traced, pieces, tmp_path):
    assert save(traced, pieces, tmp_path / "inline.onnx", inline_bytes=10**9) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["inline.onnx"]
    save(traced, pieces, tmp_path / "beside.onnx")
    inline, beside = (onnx.load(tmp_path / f"{name}.onnx").graph.initializer for name in ("inline", "beside"))
    for one, other in zip(inline, beside, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other), strict=True)


def test_more_weights_than_an_onnx_file_holds_are_refused_before_anything_is_written(traced, pieces, tmp_path):
    proto = onnx.ModelProto()
    proto.CopyFrom(traced.proto)
    proto.graph.initializer[0].dims[:] = [2**29]
    with pytest.raises(UserError) as refusal:
        save(dataclasses.replace(traced, proto=proto), pieces, tmp_path / "g.onnx", inline_bytes=2**40)
    assert refusal.value.what.endswith(" of the graph would lie in the .onnx file, which holds 2,147,483,647")
    assert refusal.value.hint == "give a smaller --external-data, so that more weights lie in the data file"
    assert list(tmp_path.iterdir()) == []


def test_the_graph_itself_needs_room_in_the_file(traced, pieces, tmp_path, monkeypatch):
    save(traced, pieces, tmp_path / "g.onnx", inline_bytes=10**9)
    monkeypatch.setattr(bind, "_ONNX_FILE_BYTES", bytes_of(traced) + 1)
    with pytest.raises(UserError, match=rf"^{bytes_of(traced):,} bytes of weights and [\d,]+ of the graph "):
        save(traced, pieces, tmp_path / "other.onnx", inline_bytes=10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_half_the_bits_are_folded_as_they_are():
    node = onnx.helper.make_node("Transpose", ["w"], ["t"])
    values = [onnx.helper.make_tensor_value_info(*value) for value in (("w", 16, [2, 3]), ("t", 16, [3, 2]))]
    recipe = onnx.helper.make_model(onnx.helper.make_graph([node], "folded", values[:1], values[1:]))
    weight = np.arange(6).reshape(2, 3).astype("bfloat16")
    np.testing.assert_array_equal(evaluate(recipe, {"w": weight}), weight.T, strict=True)
