"""Engines of every sample's model and of decoders with caches: GPUs that take them, bytes, time and memory of a build.

    python -m benchmarks.engines --whole > benchmarks/engines.md

It takes minutes and no GPU. What is built is the table of `tests/engines.py`, which the tests build too. ``--whole``
adds sample 07's model with all of its layers, as `benchmarks.smollm` has it: some minutes more, and 4 GB of memory.
``--quick`` builds one model of the table.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.command import Usage, moe_edge
from benchmarks.markdown import table
from benchmarks.tasks.smollm import Recipe, prepare
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from moe_spec.manifest import Manifest
from runtime.backend import ENGINE_FILE
from runtime.measuring.machine import describe_machine
from runtime.model_dir import model_bytes
from tests.engines import CASES, FORMS, GPUS, MODELS
from tests.sample_models import SAMPLE_MODELS, SampleModel, samples_of
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
        weight_bytes: of weights on the GPU, as TensorRT said.
        activation_bytes: of all else that it takes there at the largest shapes of its profile, likewise.
        usage: of the command.
    """

    model: str
    precision: str
    capabilities: tuple[str, ...]
    onnx_bytes: int
    engine_bytes: int
    weight_bytes: int
    activation_bytes: int
    usage: Usage


Case = tuple[str, SampleModel, Precision]
"""What a model is called, and what is built of it."""

WHOLE = "smollm2, 30 layers"


def cases_of_tests() -> list[Case]:
    """What the tests build."""
    return [(_titled(name), MODELS[name], precision) for name, precision in CASES]


def cases_of_whole() -> list[Case]:
    """Sample 07's model without its ``--quick``: exported once, two of four experts kept."""

    def make(zoo: Zoo) -> Path:
        moe = prepare(Recipe(), lambda line: print(line, file=sys.stderr)).moe
        return zoo.once("smollm2-whole.exported", lambda path: moe_edge("export", moe, "-o", path))

    whole = dataclasses.replace(SAMPLE_MODELS["smollm2"], make=make)
    return [(f"{WHOLE} (07)", whole, precision) for precision in GPUS]


def measure(zoo: Zoo, cases: Iterable[Case], scratch: Path) -> list[Row]:
    """Build each case once, for all GPUs that have its precision."""
    rows = []
    for name, model, precision in cases:
        print(f"{name}: {_shown(precision)}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            rows.append(_built(zoo, name, model, precision, Path(folder)))
    return rows


def _built(zoo: Zoo, name: str, model: SampleModel, precision: Precision, folder: Path) -> Row:
    first, *others = GPUS[precision]
    exported, graph, engine = model.make(zoo), folder / "model", folder / "engine"
    plan = model.plan(exported)
    optimize(exported, graph, RUNNER, plan=plan, accepted=FORMS, precision=precision, prove=False)
    also = [word for gpu in others for word in ("--also", gpu.name)]
    usage = moe_edge("build", graph, "-o", engine, "--target", first.name, *also)
    details = Manifest.load(engine).details
    return Row(
        model=name,
        precision=_shown(precision),
        capabilities=tuple(details["compute_capabilities"]),
        onnx_bytes=model_bytes(graph),
        engine_bytes=(engine / ENGINE_FILE).stat().st_size,
        weight_bytes=details["memory"]["weights"],
        activation_bytes=details["memory"]["activations"],
        usage=usage,
    )


def _titled(name: str) -> str:
    """With the samples that make it.

    >>> _titled("top-1"), _titled("mixtral")
    ('top-1 (04)', 'mixtral')
    """
    samples = samples_of(name)
    return f"{name} ({samples})" if samples else name


def _shown(precision: Precision) -> str:
    """As it was asked for.

    >>> _shown(Precision()), _shown(Precision("int8")), _shown(Precision("int4", "fp16"))
    ('fp32', 'int8', 'int4, rest fp16')
    """
    return (precision.experts or "fp32") + (f", rest {precision.rest}" if precision.rest else "")


def report(rows: Sequence[Row], command: str) -> str:
    """The document."""
    cells = [
        (
            row.model,
            row.precision,
            ", ".join(row.capabilities),
            *(f"{size / MEGABYTE:,.1f}" for size in (row.onnx_bytes, row.engine_bytes)),
            *(f"{size / MEGABYTE:,.1f}" for size in (row.weight_bytes, row.activation_bytes)),
            f"{row.usage.peak_bytes / MEGABYTE:,.0f}",
            f"{row.usage.cpu_seconds:.1f}",
        )
        for row in rows
    ]
    sizes = ("ONNX", "engine", "weights", "activations", "build")
    head = ("model (samples)", "experts", "compute capabilities", *sizes, "CPU seconds")
    return f"""# Engines that are built without a GPU

`{command}` printed this on {describe_machine()}.

Each row is one engine of TensorRT-RTX for RTX GPUs of the compute capabilities 8.6 (Ampere), 8.9 (Ada) and 12.0
(Blackwell), those of them that have its number format: fp8 begins with Ada, nvfp4 with Blackwell, and a model that
holds them is refused for the others before the build. Nobody has run one.

- *model*: the V-MoE, half of its experts kept, but for *unpruned*, *two experts*, *one expert* and *top-1* (six of
  eight, one a token). *smollm2*: a Mixtral with two layers of SmolLM2's sizes and random weights, two of four experts
  kept, with its cache; `--whole` builds sample 7's with all 30, as they were trained. Other decoders are small random
  ones, with caches.
- Sizes are MiB. *ONNX*: of the graph with its weights. *weights*, *activations*: what the engine takes on the GPU, as
  TensorRT said when it built it: it cannot be asked without one. Activations are those of the largest shapes, which
  nobody named here: 64 images, or 64 prompts of 128 tokens behind 512.
- *build*: peak of the memory of `moe-edge build` and the process in which TensorRT builds; *CPU seconds*: of both,
  Python's start included.
- Engines of models so small are mostly program; large ones are as large as their weights.

{table(head, cells, left=3)}"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model only")
    parser.add_argument("--whole", action="store_true", help="sample 07's model with all of its layers too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_of_tests()
        chosen = cases[: len(GPUS)] if options.quick else cases
        added = cases_of_whole() if options.whole else []
        rows = measure(Zoo(Path(folder)), [*chosen, *added], Path(folder))
    print(report(rows, " ".join(["python -m benchmarks.engines", *sys.argv[1:]])))
