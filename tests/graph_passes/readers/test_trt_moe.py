"""``TRT_MoE``: read by its name, written for the devices that have it, and never proven where it does not run."""

import numpy as np
import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL
from moe_spec.runner import error_between
from runtime.targets import find_target
from tests.graph_passes.block_models import compute, plan
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import (
    THREE,
    assert_same_record,
    assert_weights_are_original,
    blocks_of,
    edited,
    said,
    saved,
)
from tests.zoo import RUNNER

HINT = "--no-prove writes the result without a proof; compare it where that op runs"
BIASED = {"biased": True}


@pytest.mark.parametrize("fields", [{}, BIASED, {"unoptimised": True}], ids=["plain", "biased", "unoptimised"])
def test_the_record_is_the_model(tmp_path, fields):
    spec = spec_of("trt_moe", "softmax_renormalised", **fields)
    (block,) = blocks_of(saved(spec, tmp_path), "trt_moe")
    assert_weights_are_original(spec, block)
    assert block.router.kind == "softmax, top-k, renormalised"


@pytest.mark.parametrize("fields", [{}, BIASED], ids=["plain", "biased"])
def test_what_is_pruned_to_another_form_computes_what_numpy_does(tmp_path, fields):
    spec = spec_of("trt_moe", **fields)
    source = saved(spec, tmp_path)
    made = plan(spec, THREE, onnx_sha256(source))
    optimize(source, tmp_path / "out", RUNNER, plan=made, form="dense", prove=False)
    x = np.random.default_rng(0).standard_normal((5, spec.hidden)).astype(np.float32)
    got = RUNNER.run(tmp_path / "out" / MODEL, [{"x": x}])[0]["out"]
    assert error_between(compute(spec, x, THREE), got)[1] <= 1e-5


@pytest.mark.parametrize("fields", [{}, BIASED], ids=["plain", "biased"])
def test_what_is_written_is_read_as_the_same(tmp_path, fields):
    spec = spec_of("batched_mm", "sigmoid_bias_groups", **fields)
    source = saved(spec, tmp_path)
    made = plan(spec, (0, 1, 4, 5), onnx_sha256(source))
    for form in ("sorted", "trt_moe"):
        optimize(source, tmp_path / form, RUNNER, plan=made, form=form, prove=False)
    written = blocks_of(tmp_path / "trt_moe", "trt_moe")[0]
    assert_same_record(written, read_model(tmp_path / "sorted").blocks[0])
    again = optimize(tmp_path / "trt_moe", tmp_path / "again", RUNNER, prove=False)
    assert not [entry for entry in again.passes if entry.name == "write-blocks" and entry.modified and not again.plan]


def test_a_proof_is_refused_for_the_original_and_for_the_result(tmp_path):
    spec = spec_of("trt_moe")
    source = saved(spec, tmp_path)
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, form="dense")
    reason = "ONNX Runtime does not run TRT_MoE 'trt_moe': only TensorRT has this op"
    assert (error.value.what, error.value.hint) == (f"{source} cannot be proven here: {reason}", HINT)
    plain = spec_of("batched_mm")
    (tmp_path / "plain").mkdir()
    source = saved(plain, tmp_path / "plain")
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, form="trt_moe")
    assert error.value.what == (
        f"the result of {source} cannot be proven here: "
        "ONNX Runtime does not run TRT_MoE 'layers.0.mlp/out_sequence': only TensorRT has this op"
    )
    assert not (tmp_path / "out").exists()


def test_tensorrt_parses_what_is_written(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    spec = spec_of("batched_mm", biased=True, dtype="float32")
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "out", RUNNER, form="trt_moe", prove=False)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network()
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(tmp_path / "out" / MODEL))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    (layer,) = (layer for layer in layers if layer.type == trt.LayerType.MOE)
    layer.__class__ = trt.IMoELayer
    assert layer.activation_type == trt.MoEActType.SILU


def test_only_the_devices_that_have_it_take_it():
    assert "trt_moe" in find_target("jetson-thor").forms
    assert all("trt_moe" not in find_target(name).forms for name in ("sm89", "a100", "jetson-orin", "onnxruntime-cpu"))


def set_activation(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "TRT_MoE")
    next(entry for entry in node.attribute if entry.name == "activation_type").i = 0


def drop_input(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "TRT_MoE")
    del node.input[-1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_activation, "activation_type is 0, expected 1 (silu)"),
        (drop_input, "the node has 5 inputs, expected 6 or 9"),
    ],
)
def test_near_misses_are_refused(tmp_path, change, reason):
    path = edited(spec_of("trt_moe"), tmp_path, change)
    assert said(path, "trt_moe") == [f"trt_moe: {reason} (at TRT_MoE 'trt_moe')"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"gated": False}, "the op gates with plain silu alone"),
        ({"form": "stacked", "router": "llama4"}, "its weights multiply what the experts read"),
        (
            {"form": "nonzero", "quantization": "int8", "hidden": 64, "width": 32},
            "the op takes quantised weights in a layout of its own",
        ),
    ],
)
def test_what_it_cannot_express_is_refused(tmp_path, fields, reason):
    source = saved(spec_of(**{"form": "batched_mm", **fields}), tmp_path)
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, form="trt_moe", prove=False)
    assert error.value.what == f"form trt_moe cannot express layer layers.0.mlp: {reason}"
