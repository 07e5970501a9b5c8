"""Experts in fp8 and nvfp4 as they are written, read again and pruned; and how what ONNX Runtime lacks is run."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cli.judge import judge
from graph_passes.describe import read_model
from graph_passes.graph.opset import raise_opset
from graph_passes.model_file import load_graph
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from graph_passes.variants.float4 import NOT_RUN, NUMBERS, Float4Runner, without_float4
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL, OBSERVED, OBSERVED_CPU
from tests.graph_passes.block_models import plan
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import THREE, saved
from tests.zoo import RUNNER

SPEC = spec_of("batched_mm", "softmax_renormalised", hidden=64, width=32, opset=20, biased=True)
OPSETS = {"fp8": {"sorted": 20, "dense": 21, "gather": 21}, "nvfp4": dict.fromkeys(("sorted", "dense", "gather"), 23)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(SPEC, tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("form", ["sorted", "dense", "gather"])
@pytest.mark.parametrize("name", OPSETS)
def test_experts_are_written_in_every_form_proven_and_read_again(tmp_path, source, name, form):
    manifest = optimize(source, tmp_path / "out", RUNNER, form=form, precision=Precision(name))
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert manifest.details["not_run"] == ([NOT_RUN] if name == "nvfp4" else [])
    assert (tmp_path / "out" / OBSERVED_CPU).is_file() == (name == "nvfp4")
    written = onnx.load(tmp_path / "out" / MODEL)
    onnx.checker.check_model(written, full_check=True)
    assert [entry.version for entry in written.opset_import if not entry.domain] == [OPSETS[name][form]]
    again = optimize(tmp_path / "out", tmp_path / "again", RUNNER, form=form, precision=Precision(name))
    assert not again.modified
    assert (tmp_path / "again" / MODEL).read_bytes() == (tmp_path / "out" / MODEL).read_bytes()


@pytest.mark.parametrize("form", ["sorted", "dense"])
@pytest.mark.parametrize("name", OPSETS)
def test_pruning_takes_bytes_of_kept_experts_as_they_are(tmp_path, source, name, form):
    quantised = tmp_path / "quantised"
    optimize(source, quantised, RUNNER, form=form, precision=Precision(name))
    made = plan(SPEC, THREE, onnx_sha256(source))
    manifest = optimize(quantised, tmp_path / "pruned", RUNNER, plan=made)
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    (before,), (after,) = (read_model(path).blocks for path in (quantised, tmp_path / "pruned"))
    for old, new in zip(before.experts.weights(), after.experts.weights(), strict=True):
        assert new.values.load().tobytes() == old.values.load()[list(THREE)].tobytes()
        if old.scales is not None:
            assert new.scales is not None
            assert new.scales.values.load().tobytes() == old.scales.values.load()[list(THREE)].tobytes()


def test_experts_that_were_stored_one_by_one_get_one_scale_for_all_scales(tmp_path, source):
    optimize(source, tmp_path / "sorted", RUNNER, form="sorted", precision=Precision("nvfp4"))
    optimize(tmp_path / "sorted", tmp_path / "dense", RUNNER, form="dense")
    for form, scales in (("sorted", 24), ("dense", 3)):
        graph = onnx.load(tmp_path / form / MODEL).graph
        nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        assert [shapes[node.input[1]] for node in nodes if node.input[1] in shapes] == [()] * scales
        assert len(nodes) == 2 * scales


@pytest.mark.parametrize(("name", "stored"), [("int8", TensorProto.INT8), ("int4", TensorProto.INT4)])
def test_unsigned_integers_become_signed_where_they_leave_a_fused_op(tmp_path, name, stored):
    """TensorRT refuses uint8, uint4 and every zero point but 0."""
    path = saved(spec_of("batched_mm", "softmax_renormalised", hidden=64, width=32, opset=21), tmp_path)
    optimize(path, tmp_path / "fused", RUNNER, form="qmoe", precision=Precision(name))
    optimize(tmp_path / "fused", tmp_path / "dense", RUNNER, form="dense")
    graph = onnx.load(tmp_path / "dense" / MODEL).graph
    nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert [(types[node.input[0]], len(node.input)) for node in nodes] == [(stored, 2)] * 3


@pytest.mark.parametrize(("name", "judged"), [("fp8", "float8e4m3fn"), ("nvfp4", "float4e2m1")])
def test_verify_judges_by_the_format_of_the_weights(tmp_path, source, name, judged):
    optimize(source, tmp_path / "out", RUNNER, form="sorted", precision=Precision(name))
    report = judge(tmp_path / "out", source, bisect=False)
    assert report.precision == judged
    assert report.forced


@pytest.mark.parametrize(("axis", "size"), [(0, 16), (1, 4), (1, 0)])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_table_gives_what_dequantize_linear_would(tmp_path, axis, size, dtype):
    codes = np.random.default_rng(0).integers(0, 16, (32, 8))
    shape = () if not size else (2, 8) if axis == 0 else (32, 2)
    scales = np.asarray(np.random.default_rng(1).integers(1, 5, shape), np.float32)
    packed = (codes.reshape(-1, 2) << [0, 4]).sum(axis=1).astype(np.uint8).tobytes()
    weight = TensorProto(name="codes", dims=[32, 8], data_type=TensorProto.FLOAT4E2M1, raw_data=packed)
    small = helper.make_tensor("scales", dtype, scales.shape, scales.ravel().tolist())
    attributes = {"axis": axis, "block_size": size} if size else {}
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], **attributes),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, dtype, [32, width]) for name, width in (("x", 32), ("y", 8)))
    graph = helper.make_graph(nodes, "weights", [x], [y], [weight, small])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    feeds = {"x": np.eye(32, dtype=helper.tensor_dtype_to_np_dtype(dtype))}
    with pytest.raises(UserError, match=r"^.*model\.onnx cannot be loaded: .*; its weights are float4e2m1\n") as error:
        RUNNER.run(path, [feeds])
    assert error.value.hint == (
        "ONNX Runtime has no kernels for it: nvfp4 is for TensorRT, moe-edge build --target rtx-blackwell; here "
        "moe-edge verify compares such a model, and observed.cpu.onnx beside it runs"
    )
    wanted = NUMBERS[codes] * (np.repeat(scales, size, axis) if size else scales)
    np.testing.assert_array_equal(Float4Runner(RUNNER).run(path, [feeds])[0]["y"], wanted)
    with Float4Runner(RUNNER).open(path) as opened:
        np.testing.assert_array_equal(opened.run(feeds)["y"], wanted)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_the_bytes_of_weights_stay_where_they_are(tmp_path, source):
    optimize(source, tmp_path / "out", RUNNER, form="dense", precision=Precision("nvfp4"))
    before, after = (
        onnx.load(tmp_path / "out" / name, load_external_data=False).graph.initializer
        for name in (OBSERVED, OBSERVED_CPU)
    )
    places = {tensor.name: [entry.value for entry in tensor.external_data] for tensor in after}
    held = [tensor for tensor in before if tensor.data_type == TensorProto.FLOAT4E2M1]
    assert len(held) == 3
    assert all(places[tensor.name] == [entry.value for entry in tensor.external_data] != [] for tensor in held)


def test_what_has_no_float4_is_not_touched():
    model = helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], []))
    before = model.SerializeToString()
    without_float4(model)
    assert model.SerializeToString() == before


def test_a_graph_whose_ops_change_cannot_be_of_a_newer_opset(tmp_path):
    nodes = [helper.make_node("ReduceMax", ["x"], ["y"], axes=[1])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "model.onnx")
    read = load_graph(tmp_path / "model.onnx")
    assert not raise_opset(read, 17, "nothing")
    with pytest.raises(UserError) as error:
        raise_opset(read, 21, "what dequantises the experts")
    assert (error.value.what, error.value.hint) == (
        "what dequantises the experts needs opset 21, the model is written for 17, and ReduceMax changed in between",
        "export the model again with --opset 21, or another exporter's option of that name",
    )


@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_experts_in_nvfp4_stand_among_halves(tmp_path, source, form):
    """Since opset 23 what DequantizeLinear gives has a type of its own: networks are strongly typed."""
    manifest = optimize(source, tmp_path / "out", RUNNER, form=form, precision=Precision("nvfp4", "fp16"))
    assert manifest.details["casts"] is not None
    onnx.checker.check_model(tmp_path / "out" / MODEL, full_check=True)
    assert judge(tmp_path / "out", source, bisect=False).precision == "float4e2m1"
