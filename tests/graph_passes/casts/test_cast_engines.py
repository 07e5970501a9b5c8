"""TensorRT-RTX takes what is cast: its networks are strongly typed, so a type that is not exact is refused."""

import onnx
import pytest

from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from tests.engines import AMPERE, FORMS, built
from tests.sample_models import CACHED, SAMPLE_MODELS
from tests.zoo import RUNNER

pytest.importorskip("tensorrt_rtx")

MODELS = {**SAMPLE_MODELS, **CACHED}


@pytest.mark.parametrize(
    ("name", "precision", "products"),
    [
        ("pruned", Precision("fp16", "fp16"), {"float16", "float32"}),
        ("deepseek_v3", Precision("bf16", "bf16"), {"bfloat16", "float32"}),
        ("gpt_oss", Precision("bf16", "fp16"), {"bfloat16", "float16", "float32"}),
        ("mixtral", Precision("int8", "fp16"), {"float16", "float32"}),
    ],
    ids=lambda value: f"{value.experts} {value.rest}" if isinstance(value, Precision) else None,
)
def test_products_are_cast_and_routers_are_not(zoo, tmp_path, name, precision, products):
    exported, out = MODELS[name].make(zoo), tmp_path / "model"
    plan = MODELS[name].plan(exported)
    manifest = optimize(exported, out, RUNNER, plan=plan, accepted=FORMS, precision=precision, prove=False)
    layers = built(out, (AMPERE,)).details["layers"]
    assert {layer.split()[1] for layer in layers if layer.startswith("MATRIX_MULTIPLY")} == products
    assert layers["MATRIX_MULTIPLY float32"] == len(manifest.blocks)
    assert {layer for layer in layers if layer.startswith(("TOPK", "SOFTMAX"))} <= {"TOPK float32", "SOFTMAX float32"}


def test_scales_that_have_scales_are_cast_as_what_they_scale(zoo, tmp_path):
    """nvfp4: from opset 23 on a DequantizeLinear says the type of its result apart from that of its scales."""
    nvfp4 = Precision("nvfp4", "fp16")
    manifest = optimize(zoo.exported("vmoe"), tmp_path / "model", RUNNER, form="dense", precision=nvfp4)
    assert 0 < manifest.details["casts"]["error"] < 5e-3
    graph = onnx.load(tmp_path / "model" / "model.onnx", load_external_data=False).graph
    scales = [tensor.data_type for tensor in graph.initializer if tensor.name.endswith("_scale_scale")]
    assert scales == [onnx.TensorProto.FLOAT16] * 4
