import re

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest

from moe_spec.errors import UserError
from runtime.onnx_file import check_external_data, float_types, read_tensors
from tests.runtime import tiny

NESTED = """
<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
nested (float[n] x, bool c) => (float[n] y) {
   z = local.Double(x)
   y = If (c) <
      then_branch = then () => (float[n] a) {
         half = Constant<value = float {0.5}>()
         a = Mul(z, half)
      },
      else_branch = other () => (float[n] b) { b = Identity(z) }
   >
}
<domain: "local", opset_import: ["" : 20]>
Double (x) => (y) { two = Constant<value = double {2.0}>()  w = CastLike(two, x)  y = Mul(x, w) }
"""


def test_tensors_are_those_that_onnx_sees(tmp_path):
    path = tiny.write(tmp_path / "model") / "model.onnx"
    expected = onnx.load(path, load_external_data=False).graph.initializer
    found = {tensor.name: tensor for tensor in read_tensors(path)}
    assert list(found) == [tensor.name for tensor in expected]
    for tensor in expected:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location")
        row = found[tensor.name]
        assert (row.location, row.offset) == (location, int(entries.get("offset", 0)))
        assert np.dtype(row.dtype) == onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)


def test_constants_in_nodes_subgraphs_and_functions_are_found(tmp_path):
    onnx.save(onnx.parser.parse_model(NESTED), tmp_path / "nested.onnx")
    assert float_types(read_tensors(tmp_path / "nested.onnx")) == ["float32", "float64"]


def test_every_number_format_has_the_name_that_onnx_gives_it(tmp_path):
    names = {"FLOAT": "float32", "DOUBLE": "float64"}
    for name, number in onnx.TensorProto.DataType.items():
        if name in ("UNDEFINED", "STRING"):
            continue
        graph = onnx.GraphProto(initializer=[onnx.TensorProto(name="w", dims=[1], data_type=number, raw_data=b"0")])
        (tmp_path / name).write_bytes(onnx.ModelProto(graph=graph).SerializeToString())
        (tensor,) = read_tensors(tmp_path / name)
        assert tensor.dtype == names.get(name, name.lower())


def cut_data(directory):
    path = directory / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-100])
    return (
        "{dir}/model.onnx.data has 8444 bytes, model.onnx reads 8544 of it\n"
        "hint: copy both files again, or export the model again"
    )


def remove_data(directory):
    (directory / "model.onnx.data").unlink()
    return (
        "{dir}/model.onnx.data is missing, model.onnx keeps its weights there\n"
        "hint: copy both files again, or export the model again"
    )


def cut_graph(directory):
    path = directory / "model.onnx"
    path.write_bytes(path.read_bytes()[:-30])
    return "{dir}/model.onnx is no complete ONNX file\nhint: copy or export the model again"


def empty_graph(directory):
    (directory / "model.onnx").write_bytes(b"")
    return "{dir}/model.onnx is no complete ONNX file\nhint: copy or export the model again"


def break_inside(directory):
    path = directory / "model.onnx"
    graph = path.read_bytes()
    at = graph.rindex(b"model.onnx.data") + 2  # in the name of a file, in an entry, in a tensor, in the graph
    path.write_bytes(graph[:at] + b"\xff" + graph[at + 1 :])
    return "{dir}/model.onnx is no complete ONNX file\nhint: copy or export the model again"


def remove_graph(directory):
    (directory / "model.onnx").unlink()
    return "{dir}/model.onnx does not exist, expected an ONNX model\nhint: check the path"


def lead_outside(directory):
    (directory.parent / "secret").write_bytes(b"0" * 100_000)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../secret" if entry.key == "location" else entry.value
    onnx.save(model, directory / "model.onnx")
    return (
        "{dir}/model.onnx names the file '../secret', which lies outside {dir}\n"
        "hint: a model may only name files in its own directory; get the model from a source you trust"
    )


@pytest.mark.parametrize(
    "damage", [cut_data, remove_data, cut_graph, empty_graph, break_inside, remove_graph, lead_outside]
)
def test_a_damaged_or_hostile_file_is_named(tmp_path, damage):
    directory = tiny.write(tmp_path / "model")
    message = damage(directory).format(dir=directory)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_external_data(directory / "model.onnx")


def test_bytes_at_random_are_no_onnx_file(tmp_path):
    random = np.random.default_rng(0)
    for size in (1, 10, 1000, 100_000):
        (tmp_path / "noise").write_bytes(random.bytes(size))
        with pytest.raises(UserError, match=re.escape(f"{tmp_path}/noise is no complete ONNX file")):
            read_tensors(tmp_path / "noise")


def test_graphs_nested_beyond_reason_are_refused(tmp_path):
    def field(number, payload):
        head, size = bytes([number << 3 | 2]), len(payload)
        length = b""
        while size > 0x7F:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return head + length + bytes([size]) + payload

    graph = b""
    for _ in range(1000):
        graph = field(1, field(5, field(6, graph)))  # a node's attribute is a graph
    (tmp_path / "deep.onnx").write_bytes(field(7, graph))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/deep.onnx is no complete ONNX file")):
        read_tensors(tmp_path / "deep.onnx")
