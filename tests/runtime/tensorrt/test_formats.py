"""The formats that ``targets`` lists for TensorRT-RTX are those that it builds, and it refuses the others."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from moe_spec.errors import UserError
from runtime.targets import TARGETS
from runtime.tensorrt.plan_header import plan_capabilities
from runtime.tensorrt.process import build_in_fresh_process
from runtime.tensorrt.request import BuildRequest

pytest.importorskip("tensorrt_rtx")

ROWS = [row for row in TARGETS if row.backend == "tensorrt-rtx"]
FORMATS = {
    "int8": TensorProto.INT8,
    "int4": TensorProto.INT4,
    "float8e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float4e2m1": TensorProto.FLOAT4E2M1,
}
BLOCK, K, N = 16, 64, 32


def write(path, name):
    """A product with weights (K, N) of format ``name`` in blocks, in float16. Scales of fp4 are fp8, as in nvfp4."""
    weights = helper.make_tensor("weights", FORMATS[name], [K, N], np.ones(K * N).tolist())
    blocks = [K // BLOCK, N]
    scales = helper.make_tensor("scales", TensorProto.FLOAT16, blocks, np.ones(blocks).ravel().tolist())
    nodes = [helper.make_node("DequantizeLinear", ["weights", "scales"], ["w"], axis=0, block_size=BLOCK)]
    constants = [weights, scales]
    if name == "float4e2m1":
        scales.name = "unused"
        small = helper.make_tensor("small", TensorProto.FLOAT8E4M3FN, blocks, np.ones(blocks).ravel().tolist())
        whole = helper.make_tensor("whole", TensorProto.FLOAT16, [], [0.5])
        nodes.insert(0, helper.make_node("DequantizeLinear", ["small", "whole"], ["scales"]))
        constants = [weights, small, whole]
    nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, [8, size]) for name, size in (("x", K), ("y", N)))
    graph = helper.make_graph(nodes, "weights", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)


def request(folder, *rows):
    capabilities = tuple(row.compute_capability for row in rows)
    return BuildRequest(rows[0].backend, rows[0].name, folder / "model.onnx", folder / "model.engine", capabilities, ())


@pytest.mark.parametrize("name", FORMATS)
def test_all_targets_that_list_a_format_take_it(tmp_path, name):
    able = [row for row in ROWS if name in row.precisions]
    write(tmp_path / "model.onnx", name)
    facts = build_in_fresh_process(request(tmp_path, *able), tmp_path / "log")
    assert facts.layers[f"CONSTANT {name}"] == 1
    assert set(plan_capabilities(tmp_path / "model.engine")) == {row.compute_capability for row in able}


@pytest.mark.parametrize(
    ("name", "row"),
    [(name, row) for name in FORMATS for row in ROWS if name not in row.precisions],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_others_do_not(tmp_path, name, row):
    write(tmp_path / "model.onnx", name)
    with pytest.raises(UserError, match=r"^model\.onnx holds fp(8_e4m3|4_e2m1), which sm\d+ cannot compute with\n"):
        build_in_fresh_process(request(tmp_path, row), tmp_path / "log")
