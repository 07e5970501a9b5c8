"""Reading and writing ONNX files: damage, untrusted paths, weights that stay on disk."""

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
from onnx import numpy_helper

from graph_passes.describe import inspect_model
from graph_passes.graph.walk import constants
from graph_passes.model_file import load_graph, model_path, save_graph, save_variant
from graph_passes.weights.stored import of_constant
from graph_passes.weights.weight import Weight, from_array
from moe_spec.errors import UserError
from tests.graph_passes.block_models import Spec, save, weights
from tests.heard import Heard
from tests.zoo import RUNNER

X = {"x": np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)}


@pytest.fixture
def external(tmp_path):
    """A block whose weights lie in model.onnx.data."""
    save(Spec(), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    return tmp_path / "model.onnx"


@pytest.mark.parametrize(
    "layout",
    [{"location": "model.onnx.data"}, {"location": "model.onnx_data"}, {"all_tensors_to_one_file": False}],
    ids=["one file", "one file, as optimum calls it", "a file for each tensor"],
)
def test_other_weights_are_another_model_wherever_they_lie(tmp_path, layout):
    path = tmp_path / "model.onnx"
    save(Spec(), path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, size_threshold=64, **layout)
    before = inspect_model(path).source_sha256
    files = [file for file in tmp_path.iterdir() if file != path]
    assert files
    for file in files:
        stored = file.read_bytes()
        file.write_bytes(bytes([stored[0] ^ 1]) + stored[1:])
        assert inspect_model(path).source_sha256 != before
        file.write_bytes(stored)
    assert inspect_model(path).source_sha256 == before


def test_a_round_trip_computes_the_same(external, tmp_path):
    (tmp_path / "new").mkdir()
    save_graph(load_graph(external), tmp_path, tmp_path / "new" / "model.onnx")
    expected, got = (RUNNER.run(path, [X])[0]["out"] for path in (external, tmp_path / "new" / "model.onnx"))
    np.testing.assert_array_equal(got, expected)


def test_a_variant_shares_the_weights_of_the_model_beside_it(external, tmp_path):
    graph = load_graph(external)
    (tmp_path / "new").mkdir()
    save_graph(graph, tmp_path, tmp_path / "new" / "model.onnx")
    save_variant(graph, tmp_path / "new" / "variant.onnx")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        "variant.onnx",
    ]
    np.testing.assert_array_equal(
        RUNNER.run(tmp_path / "new" / "variant.onnx", [X])[0]["out"], RUNNER.run(external, [X])[0]["out"]
    )


def test_progress_counts_bytes(external, tmp_path):
    heard = Heard()
    (tmp_path / "new").mkdir()
    save_graph(load_graph(external), tmp_path, tmp_path / "new" / "model.onnx", heard)
    assert heard.to_the_end() == ["writing weights"]


def test_nothing_is_read_before_it_is_needed(external):
    data = external.with_name("model.onnx.data")
    graph = load_graph(external)
    stored = {tensor.name: of_constant(tensor, external.parent) for tensor in constants(graph)}
    data.write_bytes(b"\0" * data.stat().st_size)
    assert not stored["layers.0.mlp.experts.up"].load().any()  # read now, not when the graph was loaded


def test_only_the_rows_taken_are_read():
    rows = []

    class Stored(np.ndarray):
        def __getitem__(self, index):
            if isinstance(index, list):
                rows.append(index)
            return super().__getitem__(index)

    array = np.arange(12.0).reshape(4, 3).view(Stored)
    weight = (
        Weight((4, 3), array.dtype, lambda chosen: array[list(chosen or ())], 4)
        .take([3, 1])
        .map((2, 3), lambda rows: rows * 2, row_wise=True)
    )
    np.testing.assert_array_equal(weight.take([1]).load(), [[6.0, 8.0, 10.0]])
    assert rows == [[1]]


def test_bfloat16_survives_without_a_cast(tmp_path):
    import ml_dtypes

    values = np.asarray([[1.5, -2.0], [3.0, 0.25]], ml_dtypes.bfloat16)
    weight = from_array(values).take([1])
    assert weight.dtype == ml_dtypes.bfloat16
    assert weight.nbytes == 4
    np.testing.assert_array_equal(weight.load(), values[[1]])


def test_a_cut_data_file_is_an_error_that_names_the_weight(external):
    data = external.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(UserError) as error:
        load_graph(external)
    assert f"{data} has {data.stat().st_size} bytes, but weight layers.0.mlp.experts." in error.value.what
    assert error.value.what.endswith("the file is cut")


def test_a_missing_data_file_is_an_error(external):
    data = external.with_name("model.onnx.data")
    data.unlink()
    with pytest.raises(UserError) as error:
        load_graph(external)
    assert error.value.what.startswith(f"{data} does not exist, but weight ")


@pytest.mark.parametrize("location", ["../outside.data", "/etc/passwd"])
def test_weights_outside_the_directory_are_refused(external, location):
    model = onnx.load(external, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, external)
    with pytest.raises(UserError) as error:
        load_graph(external)
    assert error.value.what == (
        f"{external.parent / 'model.onnx'} names the file {location!r}, which lies outside {external.parent}"
    )


def test_a_huge_declared_size_is_refused_before_anything_is_allocated(external):
    model = onnx.load(external, load_external_data=False)
    up = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("experts.up"))
    up.dims[0] = 1 << 40
    onnx.save(model, external)
    with pytest.raises(UserError, match="the file is cut"):
        load_graph(external)


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x0a\x12"])
def test_what_is_no_onnx_file_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_graph(path)
    assert error.value.what.startswith((f"{path} is no readable ONNX file", f"{path} is no ONNX model"))


def test_a_path_that_is_neither_file_nor_model_directory_is_refused(tmp_path):
    with pytest.raises(UserError) as error:
        model_path(tmp_path / "nothing")
    assert error.value.what == f"{tmp_path / 'nothing'} does not exist, expected an ONNX file or a model directory"
    with pytest.raises(UserError) as error:
        model_path(tmp_path)
    assert error.value.what == f"{tmp_path} is no model directory: it has no model.onnx"


def test_constant_nodes_are_read_like_initialisers(tmp_path):
    path = tmp_path / "block.onnx"
    save(Spec(), path)
    model = onnx.load(path)
    constants_of = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    del model.graph.initializer[:]
    nodes = [*constants_of, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    graph = load_graph(path)
    assert "Constant" not in [node.op for node in graph.nodes]
    up = next(tensor for tensor in constants(graph) if tensor.name.endswith("experts.up"))
    np.testing.assert_array_equal(of_constant(up, tmp_path).load(), weights(Spec())["up"])
    assert numpy_helper.to_array(model.graph.node[0].attribute[0].t).size
