"""int8 activations: ranges as the data show them, one for values that were only moved, and exact products."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from cli.judge import judge
from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from graph_passes.quantization.activations import Activations, Range
from graph_passes.quantization.quantize import Quantization, rounded
from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL, Manifest
from tests.cli.helpers import invoke
from tests.graph_passes.block_models import compute, plan
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import THREE, saved
from tests.zoo import RUNNER

SPEC = spec_of("batched_mm", "softmax_renormalised", hidden=32, width=32, opset=20, biased=True)
INT8 = Precision("int8")
X_TH = np.random.default_rng(3).standard_normal((64, 32)).astype(np.float32)
MANY = Activations(Dataset({"x": X_TH}, None, "0" * 64), "many.npz", batch_size=16)
LAYER = "layers.0.mlp"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(SPEC, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def written(tmp_path_factory, source):
    """Form ``sorted``."""
    out = tmp_path_factory.mktemp("activations") / "out"
    optimize(source, out, RUNNER, form="sorted", precision=INT8, activations=MANY)
    return out


def test_what_all_experts_read_has_one_range_and_each_middle_its_own(written):
    manifest = Manifest.load(written)
    entry = manifest.details["activations"]
    assert (entry["format"], entry["percentile"], entry["data_sha256"]) == ("int8", 100.0, "0" * 64)
    assert entry["examples"] == MANY.batch_size
    ranges = entry["ranges"]
    assert len(ranges) == 1 + SPEC.experts
    assert ranges["x"] == np.abs(X_TH).max()
    graph = onnx.load(written / MODEL).graph
    rounds = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounds) == 2 * SPEC.experts  # the run of an expert, and what is between its projections
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = {float(stored[node.input[1]]) for node in rounds}
    assert scales == {float(np.float32(largest / 127)) for largest in ranges.values()}
    assert {stored[node.input[2]].item() for node in rounds} == {0}
    onnx.checker.check_model(written / MODEL, full_check=True)


def test_the_result_is_that_of_rounded_weights_and_rounded_activations(tmp_path, source):
    """Experts that are linear but for a relu, and a scale that is known: 127 steps up to the largest |x|."""
    manifest = optimize(source, tmp_path / "out", RUNNER, form="dense", precision=INT8, activations=MANY)
    scale = np.float32(np.abs(X_TH).max() / 127)
    assert manifest.details["activations"]["ranges"] == {"x": float(np.abs(X_TH).max())}
    step_TH = np.rint(X_TH / scale) * scale
    experts = rounded(read_model(source).blocks[0].experts, Quantization("int8"))
    assert experts.gate_EHF is not None
    node = next(node for node in onnx.load(tmp_path / "out" / MODEL).graph.node if node.name == f"{LAYER}/up")
    assert node.input[0] == "x/int8_float"
    shown = onnx.load(tmp_path / "out" / MODEL)
    shown.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, [None, None]))
    onnx.save(shown, tmp_path / "out" / "shown.onnx")
    got = RUNNER.run(tmp_path / "out" / "shown.onnx", [{"x": X_TH}])[0][node.output[0]]
    up_EHF, bias_EF = experts.up_EHF.load(), read_model(source).blocks[0].experts.up_bias_EF
    assert bias_EF is not None
    wanted = np.einsum("th,ehf->tef", step_TH.astype(np.float64), up_EHF) + bias_EF.load()
    np.testing.assert_allclose(got, wanted.reshape(len(X_TH), -1), atol=1e-5)


def test_dense_keeps_the_down_projection_float(tmp_path, source):
    """Its scales belong to an expert and a channel: no int8 GEMM has such."""
    optimize(source, tmp_path / "out", RUNNER, form="dense", precision=INT8, activations=MANY)
    products = {node.name: node.input[0] for node in onnx.load(tmp_path / "out" / MODEL).graph.node}
    wanted = {"gate": True, "up": True, "down": False}
    assert {part: products[f"{LAYER}/{part}"].endswith("/int8_float") for part in wanted} == wanted


def test_activations_of_products_by_floats_stay_float(tmp_path, source):
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, precision=Precision(rest="int8"), activations=MANY)
    assert (error.value.what, error.value.hint) == (
        "no product multiplies by an int8 matrix with a scale for each output, so no activation can be int8",
        "ask for --precision int8 without --block-size in form sorted or dense, or for --rest-precision int8",
    )
    assert not (tmp_path / "out").exists()


def test_a_result_is_read_again_as_it_stands_and_judged(tmp_path, source, written):
    again = optimize(written, tmp_path / "again", RUNNER)
    assert not again.modified
    assert again.details["activations"] == Manifest.load(written).details["activations"]
    once_more = optimize(written, tmp_path / "once more", RUNNER, activations=MANY)
    assert (tmp_path / "once more" / MODEL).read_bytes() == (written / MODEL).read_bytes()
    assert not once_more.modified
    report = judge(written, source, data=MANY.data, bisect=False)
    assert (report.precision, report.forced) == ("w8a8", True)


def test_a_graph_of_a_fixed_batch_gets_the_data_in_batches_of_that_size(tmp_path, source):
    model, fixed = onnx.load(source), tmp_path / "fixed.onnx"
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(model, fixed)
    manifest = optimize(fixed, tmp_path / "out", RUNNER, form="dense", precision=INT8, activations=MANY)
    assert manifest.details["activations"]["ranges"] == {"x": float(np.abs(X_TH).max())}
    odd = Activations(Dataset({"x": X_TH[:20]}, None, "0" * 64), "odd.npz")
    with pytest.raises(UserError) as error:
        optimize(fixed, tmp_path / "none", RUNNER, form="dense", precision=INT8, activations=odd)
    assert (error.value.what, error.value.hint) == (
        f"{fixed} takes exactly 8 examples at once, not 20 in batches of 8",
        "give data of a multiple of 8 examples, or export it with a dynamic axis",
    )


def test_scales_of_activations_are_halves_among_halves(tmp_path, source):
    precision = Precision("int8", "fp16")
    manifest = optimize(source, tmp_path / "out", RUNNER, form="dense", precision=precision, activations=MANY)
    entry = next(entry for entry in manifest.passes if entry.name == "round-activations")
    assert (entry.modified, entry.nodes_after - entry.nodes_before) == (True, 2)
    graph = onnx.load(tmp_path / "out" / MODEL).graph
    (rounds,) = (node for node in graph.node if node.op_type == "QuantizeLinear")
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert types[rounds.input[1]] == onnx.TensorProto.FLOAT16
    onnx.checker.check_model(tmp_path / "out" / MODEL, full_check=True)


def test_pruning_what_rounds_its_activations_is_refused(tmp_path, source, written):
    with pytest.raises(UserError) as error:
        optimize(written, tmp_path / "out", RUNNER, plan=plan(SPEC, THREE, onnx_sha256(source)))
    assert (error.value.what, error.value.hint) == (
        f"layer {LAYER} rounds its activations, which would be lost where it is written anew",
        "prune, quantise and write the model that had float activations, with --activations int8",
    )


def test_fewer_experts_have_fewer_ranges(tmp_path, source):
    made = plan(SPEC, THREE, onnx_sha256(source))
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=made, form="sorted", precision=INT8, activations=MANY)
    assert len(manifest.details["activations"]["ranges"]) == 1 + len(THREE)
    got = RUNNER.run(tmp_path / "out" / MODEL, [{"x": X_TH}])[0]["out"]
    wanted = compute(SPEC, X_TH, THREE)
    assert 1e-4 < np.abs(got - wanted).max() / np.abs(wanted).max() < 0.2


@pytest.mark.parametrize(
    ("values", "what", "hint"),
    [
        (
            X_TH[:1],
            r"no token of few\.npz reaches Gemm 'layers\.0\.mlp/down_\d', so nobody knows the range of what it reads",
            "give data that use every expert, drop those that no token uses, or choose --form dense",
        ),
        (
            0 * X_TH,
            r"Gemm 'layers\.0\.mlp/gate_0' reads zeros only on few\.npz, which have no range",
            "leave --activations out, or choose another --calibration",
        ),
        (
            np.where(np.arange(32) == 3, np.inf, X_TH).astype(np.float32),
            r"Gemm 'layers\.0\.mlp/gate_0' reads numbers that are not finite on few\.npz",
            "leave --activations out, or choose another --calibration",
        ),
    ],
    ids=["an expert that nobody uses", "zeros", "infinity"],
)
def test_data_that_do_not_tell_a_range_are_refused_by_name(tmp_path, source, values, what, hint):
    few = Activations(Dataset({"x": values}, None, "0" * 64), "few.npz")
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, form="sorted", precision=INT8, activations=few, prove=False)
    assert re.fullmatch(what, error.value.what)
    assert error.value.hint == hint
    assert not (tmp_path / "out").exists()


def test_a_percentile_among_zeros_is_refused(tmp_path, source):
    """As behind a ReLU that is seldom active: all that is in range would be rounded to zeros."""
    sparse = np.where(np.arange(X_TH.size).reshape(X_TH.shape) % 25 == 0, X_TH, 0).astype(np.float32)
    data = Dataset({"x": sparse}, None, "0" * 64)
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, form="dense", precision=INT8, activations=Activations(data, "x", 90))
    what = r"90 percent of what Gemm '(.+)' reads on x are zeros, so the rest would become zeros too"
    assert re.fullmatch(what, error.value.what)
    assert error.value.hint == "give a higher --percentile"
    fits = Activations(data, "x", 99)
    manifest = optimize(source, tmp_path / "out", RUNNER, form="dense", precision=INT8, activations=fits)
    assert manifest.details["activations"]["ranges"]["x"] > 1


@pytest.mark.parametrize(
    ("name", "data", "what", "hint"),
    [
        ("fp8", None, "activations cannot be fp8", "--activations int8"),
        ("int8", None, "int8 activations need data that show their ranges", "--calibration DATA.npz"),
        (None, Path("x.npz"), "--calibration is for activations that become int8", "--activations int8"),
    ],
)
def test_half_a_wish_is_refused(source, name, data, what, hint):
    with pytest.raises(UserError) as error:
        Activations.load(name, data, source)
    assert (error.value.what, error.value.hint) == (what, hint)


def test_a_percentile_of_nothing_is_refused(source):
    with pytest.raises(
        UserError, match=r"^--percentile is for activations that become int8\nhint: --activations int8$"
    ):
        Activations.load(None, None, source, 99.9)


def test_data_and_percentile_come_from_the_command_line(tmp_path, source):
    np.savez(tmp_path / "many.npz", x=X_TH)
    line = (
        "optimize",
        source,
        "--form",
        "sorted",
        "--precision",
        "int8",
        "--activations",
        "int8",
        "-o",
        tmp_path / "out",
    )
    code, out, _ = invoke(*line, "--calibration", tmp_path / "many.npz", "--percentile", 99)
    assert code == 0
    said = r"; activations in int8 change them by up to \d\.\de-\d\d on the first 32 examples of the data$"
    assert re.search(said, out.splitlines()[0])
    entry = Manifest.load(tmp_path / "out").details["activations"]
    assert entry["ranges"]["x"] == pytest.approx(np.quantile(np.abs(X_TH), 0.99), rel=0.02)
    code, _, err = invoke(*line, "--calibration", tmp_path / "many.npz", "--percentile", 101)
    assert (code, err) == (1, "error: there is no percentile 101\nhint: --percentile is above 0, at most 100\n")


def test_a_fused_op_has_nothing_to_round(tmp_path, source):
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, form="qmoe", precision=INT8, activations=MANY)
    assert (error.value.what, error.value.hint) == (
        "form qmoe computes with float activations inside its op",
        "leave --activations out, or choose another --form",
    )
    every = ("qmoe", "sorted")
    manifest = optimize(source, tmp_path / "out", RUNNER, accepted=every, precision=INT8, activations=MANY)
    assert [block.form for block in manifest.blocks] == ["sorted"]


@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1), percentile=st.floats(1, 100), cut=st.integers(0, 99)
)
def test_a_percentile_is_right_to_the_width_of_a_bin_in_whatever_order(values, percentile, cut):
    array, seen, turned = np.array(values, np.float32), Range(), Range()
    seen.add(array)
    for part in (array[cut:], array[:cut]):
        turned.add(part)
    found = seen.largest(percentile)
    assert found == turned.largest(percentile)
    assert seen.largest(100) == np.abs(array).max()
    inside = np.mean(np.abs(array) <= found)
    assert inside >= percentile / 100 - 1e-9 or found == np.abs(array).max()
    exact = np.sort(np.abs(array))[int(np.ceil(len(array) * percentile / 100)) - 1]
    assert exact <= found <= exact * (1 + 2.0**-7) + 1e-38
