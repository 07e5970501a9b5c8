"""What samples make, and decoders with their caches, really built by TensorRT-RTX in every precision that it has."""

from collections.abc import Mapping, Sequence

import pytest

from graph_passes.optimize import optimize
from graph_passes.precision import FORMATS, Precision
from runtime.targets import Target
from tests.engines import ADA, AMPERE, BLACKWELL, FORMS, built
from tests.sample_models import CACHED, SAMPLE_MODELS
from tests.zoo import RUNNER

pytest.importorskip("tensorrt_rtx")

MODELS = {**SAMPLE_MODELS, **CACHED}

GPUS: Mapping[Precision, Sequence[Target]] = {
    Precision(): (AMPERE, ADA, BLACKWELL),
}
"""Which of them have the number format."""


@pytest.mark.parametrize("precision", GPUS, ids=lambda precision: precision.experts or "fp32")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_for_every_gpu_that_has_its_precision(zoo, tmp_path, name, precision):
    model = MODELS[name]
    exported, out = model.make(zoo), tmp_path / "model"
    plan = model.plan(exported)
    optimized = optimize(exported, out, RUNNER, plan=plan, accepted=FORMS, precision=precision, prove=False)
    details = built(out, GPUS[precision]).details
    ranked = [block for block in optimized.blocks if block.experts > block.top_k]
    assert {layer for layer in details["layers"] if layer.startswith("TOPK")} == ({"TOPK float32"} if ranked else set())
    if precision.experts is not None:
        assert details["layers"][f"CONSTANT {FORMATS[precision.experts]}"] >= 2 * len(optimized.blocks)
