"""Real engines for tests. One serves several generations of GPUs, so that one build shows that all of them take it.

TensorRT-RTX compiles it for each: where one of them cannot, the build fails and names it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from graph_passes.precision import Precision
from graph_passes.writers import WRITERS
from moe_spec.manifest import Manifest
from runtime.backend import ENGINE_FILE, BuildOptions
from runtime.build import build
from runtime.targets import Target, find_target
from runtime.tensorrt.plan_header import plan_capabilities
from tests.sample_models import CACHED, SAMPLE_MODELS

AMPERE, ADA, BLACKWELL = map(find_target, ("sm86", "sm89", "sm120"))
FORMS = tuple(form for form in WRITERS if form in ADA.forms)
"""What all of them take."""

MODELS = {**SAMPLE_MODELS, **CACHED}

GPUS: Mapping[Precision, Sequence[Target]] = {
    Precision(): (AMPERE, ADA, BLACKWELL),
    Precision("fp16", "fp16"): (AMPERE, ADA, BLACKWELL),
    Precision("int8"): (AMPERE, ADA, BLACKWELL),
    Precision("int4", "fp16"): (AMPERE, ADA, BLACKWELL),
    Precision("fp8", "fp16"): (ADA, BLACKWELL),
    Precision("nvfp4", "fp16"): (BLACKWELL,),
}
"""Which of the three can compute with it."""

COARSE_AND_FINE = [Precision(), Precision("int4", "fp16")]
"""Enough for decoders that no sample makes: they differ in caches, not in experts."""

CASES = [(name, precision) for name in MODELS for precision in (GPUS if name in SAMPLE_MODELS else COARSE_AND_FINE)]


def built(model: Path, gpus: Sequence[Target] = (AMPERE, ADA, BLACKWELL)) -> Manifest:
    """The manifest of the engine of that model directory, built beside it for all of ``gpus``."""
    engine = model.with_name("engine")
    manifest = build(model, gpus[0], BuildOptions(also=tuple(gpus[1:])), engine)
    assert plan_capabilities(engine / ENGINE_FILE) == [gpu.compute_capability for gpu in gpus]
    manifest.check_files(engine)
    return manifest
