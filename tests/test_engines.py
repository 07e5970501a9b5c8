"""What samples make, and decoders with their caches, really built by TensorRT-RTX in every precision that it has."""

import dataclasses
import re

import pytest

from cli.journey import KEEPS, TRAINED
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from moe_spec.errors import UserError
from moe_spec.formats import FORMATS
from tests.engines import ADA, AMPERE, CASES, FORMS, GPUS, MODELS, built
from tests.markdown import read_blocks
from tests.sample_models import MADE, NOT_BUILT, SAMPLE_MODELS, SAMPLES
from tests.zoo import RUNNER

pytest.importorskip("tensorrt_rtx")

WRITES = re.compile(r"^moe-edge (?:export|optimize) .*-o (\S+)", re.MULTILINE)


def made_by(readme):
    """What a sample exports and optimises into; what is refused is not made."""
    done = [block.text for block in read_blocks(readme) if block.runs and not block.exit_code]
    return set(WRITES.findall("\n".join(done)))


def test_every_model_that_a_sample_makes_is_built_or_it_is_said_why_not():
    made = {readme.parent.name[:2]: made_by(readme) for readme in SAMPLES.glob("*/README.md")}
    made["demo"] = {*(f"keep-{keep}" for keep in KEEPS), TRAINED}
    left_out = {sample: {folder for other, folder in NOT_BUILT if other == sample} for sample in made}
    assert {sample: set(MADE[sample]) | left_out[sample] for sample in made} == made
    assert {name for folders in MADE.values() for name in folders.values()} == set(SAMPLE_MODELS)


@pytest.mark.parametrize(("name", "precision"), CASES, ids=lambda value: getattr(value, "experts", value) or "fp32")
def test_a_model_is_built_for_every_gpu_that_has_its_precision(zoo, tmp_path, name, precision):
    model = MODELS[name]
    exported, out = model.make(zoo), tmp_path / "model"
    plan = model.plan(exported)
    optimized = optimize(exported, out, RUNNER, plan=plan, accepted=FORMS, precision=precision, prove=False)
    details = built(out, GPUS[precision]).details
    layers, inputs = details["layers"], {spec.name for spec in optimized.inputs}
    routers = [block for block in optimized.blocks if block.experts > 1]
    ranked = any(block.top_k < block.experts for block in optimized.blocks)
    assert {layer for layer in layers if layer.startswith("TOPK")} == ({"TOPK float32"} if ranked else set())
    if precision.rest == "fp16":
        assert layers.get("MATRIX_MULTIPLY float32", 0) == len(routers)
        assert layers["MATRIX_MULTIPLY float16"] > len(routers)
    assert details["precision"] == dataclasses.asdict(precision)
    if precision.quantization is not None:
        weights = len(optimized.blocks) * (2 if "pixel_values" in inputs else 3)  # a V-MoE's experts are not gated
        assert layers[f"CONSTANT {FORMATS[precision.experts]}"] == weights


@pytest.mark.parametrize(
    ("precision", "targets", "reason"),
    [
        (
            "nvfp4",
            [ADA],
            "model.onnx holds float4e2m1, rtx-ada takes bfloat16, float16, float32, float64, float8e4m3fn, int4, int8\n"
            "hint: as it is, it can be built here for rtx-blackwell, dgx-spark; write one from the float model: "
            "moe-edge optimize FLOAT_MODEL -o DIRECTORY --target rtx-ada --precision int8",
        ),
        (
            "fp8",
            [ADA, AMPERE],
            "model.onnx holds float8e4m3fn, rtx-ampere takes bfloat16, float16, float32, float64, int4, int8\n"
            "hint: as it is, it can be built here for onnxruntime-cpu, onnxruntime-arm64, rtx-ada, rtx-blackwell, "
            "dgx-spark; write one from the float model: moe-edge optimize FLOAT_MODEL -o DIRECTORY --target rtx-ampere "
            "--precision int8",
        ),
    ],
)
def test_a_gpu_that_lacks_the_format_is_refused_before_the_build(precision, targets, reason, zoo, tmp_path):
    model = tmp_path / "model"
    optimize(zoo.exported("vmoe"), model, RUNNER, form="dense", precision=Precision(precision), prove=False)
    message = f"{model} cannot be built for rtx-ada: {reason}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        built(model, targets)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
