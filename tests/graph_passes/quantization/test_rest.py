"""Weights outside the MoE layers are quantised by themselves: never a router's, and what is left is told."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from graph_passes.quantization.activations import Activations
from graph_passes.quantization.rest import of_details
from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.manifest import MODEL
from tests.graph_passes.block_models import save
from tests.graph_passes.block_models.kinds import spec_of
from tests.zoo import RUNNER

HIDDEN, WIDTH = 64, 32
FORMATS = {"int8": TensorProto.INT8, "int4": TensorProto.INT4, "fp8": TensorProto.FLOAT8E4M3FN}
FORMATS["nvfp4"] = TensorProto.FLOAT4E2M1


def saved_between(folder, form: str = "batched_mm", opset: int = 20):
    """An MoE layer between others: products of a Gemm and a MatMul, and weights that are used in other ways."""
    path = folder / "block.onnx"
    folder.mkdir(exist_ok=True)
    save(spec_of(form, "softmax_renormalised", hidden=HIDDEN, width=WIDTH, opset=opset), path)
    model, random = onnx.load(path), np.random.default_rng(0)
    graph = model.graph
    for node in graph.node:
        node.input[:] = ["dense" if name == "x" else name for name in node.input]
        node.output[:] = ["experts_sum" if name == "out" else name for name in node.output]
    shapes = {
        "up": (HIDDEN, 96),
        "down": (HIDDEN, 96),
        "embeddings": (32, HIDDEN),
        "odd": (HIDDEN, 33),
        "tied": (HIDDEN, HIDDEN),
        "gate": (HIDDEN, 1),
    }
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32) / np.float32(8)
        graph.initializer.append(numpy_helper.from_array(values, name))
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "row"))
    op = helper.make_node
    before = [op("MatMul", ["x", "up"], ["wide"]), op("Gemm", ["wide", "down"], ["dense"], transB=1)]
    behind = [
        op("Gather", ["embeddings", "row"], ["looked_up"]),
        op("Add", ["experts_sum", "looked_up"], ["both"]),
        op("Transpose", ["odd"], ["turned"], perm=[1, 0]),
        op("MatMul", ["both", "odd"], ["narrow"]),
        op("MatMul", ["narrow", "turned"], ["again"]),
        op("MatMul", ["again", "tied"], ["last"]),
        op("Gather", ["tied", "row"], ["tied_row"]),
        op("MatMul", ["last", "gate"], ["share"]),
        op("Mul", ["last", "share"], ["gated"]),
        op("Add", ["gated", "tied_row"], ["out"]),
    ]
    nodes = [*before, *graph.node, *behind]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved_between(tmp_path_factory.mktemp("rest"))


def stored(path) -> dict[str, int]:
    """The type of every weight."""
    return {tensor.name: tensor.data_type for tensor in onnx.load(path / MODEL).graph.initializer}


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_of_products_are_quantised_and_the_others_told(tmp_path, source, name):
    size = {"int4": 32, "nvfp4": 16}.get(name)
    how = Precision(rest=name, block_size=32 if name == "int4" else None)
    manifest = optimize(source, tmp_path / "out", RUNNER, precision=how)
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert 1e-4 < manifest.details["precision_error"] < 1
    rest = of_details(manifest.details["rest"])
    whole = name in ("int8", "fp8")
    assert rest.quantized == (("up", "down", "odd") if whole else ("up", "down"))
    assert dict(rest.left) == {
        "embeddings": "Gather reads it",
        "tied": "Gather reads it too",
        **({} if whole else {"odd": f"its 33 inputs are no multiple of the block size {size}"}),
    }
    types = stored(tmp_path / "out")
    assert {types[f"rest/{weight}"] for weight in rest.quantized} == {FORMATS[name]}
    onnx.checker.check_model(tmp_path / "out" / MODEL, full_check=True)
    again = optimize(tmp_path / "out", tmp_path / "again", RUNNER, precision=how)
    assert not again.modified


def test_routers_and_experts_stay_to_the_last_bit(tmp_path, source):
    optimize(source, tmp_path / "out", RUNNER, precision=Precision(rest="int4", block_size=32))
    (before,), (after,) = (read_model(path).blocks for path in (source, tmp_path / "out"))
    for old, new in (
        (before.router.weight_EH, after.router.weight_EH),
        *zip(before.experts.weights(), after.experts.weights(), strict=True),
    ):
        assert (new.scales, new.dtype) == (None, old.dtype)
        np.testing.assert_array_equal(new.load(), old.load())


def test_layers_that_round_their_activations_are_proven_as_they_stand(tmp_path, source):
    x = np.random.default_rng(3).standard_normal((64, HIDDEN)).astype(np.float32)
    data = Activations(Dataset({"x": x}, None, "0" * 64), "many.npz")
    optimize(source, tmp_path / "first", RUNNER, form="sorted", precision=Precision("int8"), activations=data)
    manifest = optimize(tmp_path / "first", tmp_path / "second", RUNNER, precision=Precision(rest="int8"))
    assert of_details(manifest.details["rest"]).quantized == ("up", "down", "odd")
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5


def test_no_layer_has_to_be_written_for_it(tmp_path):
    """Opset 16 is none that writers know."""
    source = saved_between(tmp_path, "stacked", opset=16)
    manifest = optimize(source, tmp_path / "out", RUNNER, precision=Precision(rest="int8"))
    assert of_details(manifest.details["rest"]).quantized == ("up", "down", "odd")
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert [block.form for block in manifest.blocks] == ["stacked"]


def test_experts_and_rest_have_formats_of_their_own(tmp_path, source):
    precision = Precision("fp8", "int4", block_size=32)
    manifest = optimize(source, tmp_path / "out", RUNNER, form="dense", precision=precision)
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    types = list(stored(tmp_path / "out").values())
    assert types.count(TensorProto.FLOAT8E4M3FN) == 3
    assert types.count(TensorProto.INT4) == 2


def test_gates_stay_float(tmp_path, source, monkeypatch):
    monkeypatch.setattr("graph_passes.quantization.rest.SMALL", HIDDEN)
    manifest = optimize(source, tmp_path / "out", RUNNER, precision=Precision(rest="int8"))
    assert dict(manifest.details["rest"]["left"])["gate"] == "it gives one number, as gates do"


def test_shared_experts_and_attention_are_rest(tmp_path, zoo):
    manifest = optimize(
        zoo.exported("qwen2_moe"), tmp_path / "out", RUNNER, precision=Precision(rest="int8"), prove=False
    )
    names = " ".join(manifest.details["rest"]["quantized"])
    assert all(part in names for part in ("q_proj", "o_proj", "shared_expert.up_proj", "lm_head"))
    assert "mlp.gate" not in names
    assert "experts." not in names


def test_a_model_with_an_unknown_router_is_refused(tmp_path, source):
    model = onnx.load(source)
    router = next(node for node in model.graph.node if node.op_type == "TopK")
    del router.attribute[:]
    router.attribute.append(helper.make_attribute("largest", 0))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UserError) as error:
        optimize(
            tmp_path / "model.onnx", tmp_path / "out", RUNNER, precision=Precision(rest="int8"), allow_partial=True
        )
    assert error.value.what.startswith("routers are never quantised, and that of layer ")
    assert error.value.hint == "leave --rest-precision out"
