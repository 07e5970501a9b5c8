"""Engines of every sample's model and of decoders with caches: GPUs that take them, bytes, time of a build.

    python -m benchmarks.engines > benchmarks/engines.md

It takes some minutes and no GPU. What is built is the table of `tests/engines.py`, which the tests build too.
``--quick`` builds one model.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.command import moe_edge
from benchmarks.markdown import table
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from moe_spec.manifest import Manifest
from runtime.backend import ENGINE_FILE
from runtime.measuring.machine import describe_machine
from runtime.model_dir import model_bytes
from tests.engines import CASES, FORMS, GPUS, MODELS
from tests.zoo import RUNNER, Zoo

MEGABYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One engine.

    Attributes:
        model: its name, and the samples that make it.
        precision: of the experts, and of the rest.
        capabilities: of the GPUs that it is for.
        onnx_bytes: of the graph and its weights.
        engine_bytes: of the engine.
        cpu_seconds: that the command took.
    """

    model: str
    precision: str
    capabilities: tuple[str, ...]
    onnx_bytes: int
    engine_bytes: int
    cpu_seconds: float


def measure(zoo: Zoo, cases: Iterable[tuple[str, Precision]], scratch: Path) -> list[Row]:
    """Build each case once, for all GPUs that have its precision."""
    rows = []
    for index, (name, precision) in enumerate(cases):
        print(f"{name}: {_shown(precision)}", file=sys.stderr)
        rows.append(_built(zoo, name, precision, scratch / str(index)))
    return rows


def _built(zoo: Zoo, name: str, precision: Precision, folder: Path) -> Row:
    model, (first, *others) = MODELS[name], GPUS[precision]
    exported, graph, engine = model.make(zoo), folder / "model", folder / "engine"
    plan = model.plan(exported)
    optimize(exported, graph, RUNNER, plan=plan, accepted=FORMS, precision=precision, prove=False)
    also = [word for gpu in others for word in ("--also", gpu.name)]
    usage = moe_edge("build", graph, "-o", engine, "--target", first.name, *also)
    return Row(
        model=f"{name} ({model.sample})" if model.sample else name,
        precision=_shown(precision),
        capabilities=tuple(Manifest.load(engine).details["compute_capabilities"]),
        onnx_bytes=model_bytes(graph),
        engine_bytes=(engine / ENGINE_FILE).stat().st_size,
        cpu_seconds=usage.cpu_seconds,
    )


def _shown(precision: Precision) -> str:
    """As it was asked for.

    >>> _shown(Precision()), _shown(Precision("int8")), _shown(Precision("int4", "fp16"))
    ('fp32', 'int8', 'int4, rest fp16')
    """
    return (precision.experts or "fp32") + (f", rest {precision.rest}" if precision.rest else "")


def report(rows: Sequence[Row]) -> str:
    """The document."""
    cells = [
        (
            row.model,
            row.precision,
            ", ".join(row.capabilities),
            f"{row.onnx_bytes / MEGABYTE:.2f}",
            f"{row.engine_bytes / MEGABYTE:.2f}",
            f"{row.cpu_seconds:.1f}",
        )
        for row in rows
    ]
    head = ("model (samples)", "experts", "compute capabilities", "ONNX MB", "engine MB", "CPU seconds")
    return f"""# Engines that are built without a GPU

`python -m benchmarks.engines` printed this on {describe_machine()}.

Each row is one engine of TensorRT-RTX for RTX GPUs of the compute capabilities 8.6 (Ampere), 8.9 (Ada) and 12.0
(Blackwell), those of them that have its number format: fp8 begins with Ada, nvfp4 with Blackwell, and a model that
holds them is refused for the others before the build. Nobody has run one.

- *model*: half of the experts kept, but for *one expert* and *top-1* (six of eight, one a token). Decoders are small
  random ones, with caches.
- *CPU seconds*: of `moe-edge build` as a process, Python's start included.
- Engines of models so small are mostly program: their bytes say little about large ones, which are as large as their
  weights.

{table(head, cells, left=3)}"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        chosen = [case for case in CASES if case[0] == next(iter(MODELS))] if options.quick else CASES
        print(report(measure(Zoo(root), chosen, root / "engines")))
