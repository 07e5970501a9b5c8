"""Real engines for tests. One serves several generations of GPUs, so that one build shows that all of them take it.

TensorRT-RTX compiles it for each: where one of them cannot, the build fails and names it.
"""

from collections.abc import Sequence
from pathlib import Path

from graph_passes.writers import WRITERS
from moe_spec.manifest import Manifest
from runtime.backend import ENGINE_FILE, BuildOptions
from runtime.build import build
from runtime.targets import Target, find_target
from runtime.tensorrt.plan_header import plan_capabilities

AMPERE, ADA, BLACKWELL = map(find_target, ("sm86", "sm89", "sm120"))
FORMS = tuple(form for form in WRITERS if form in ADA.forms)
"""What all of them take."""


def built(model: Path, gpus: Sequence[Target] = (AMPERE, ADA, BLACKWELL)) -> Manifest:
    """The manifest of the engine of that model directory, built beside it for all of ``gpus``."""
    engine = model.with_name("engine")
    manifest = build(model, gpus[0], BuildOptions(also=tuple(gpus[1:])), engine)
    assert plan_capabilities(engine / ENGINE_FILE) == [gpu.compute_capability for gpu in gpus]
    manifest.check_files(engine)
    return manifest
