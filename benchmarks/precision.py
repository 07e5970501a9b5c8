"""What each number format costs in accuracy: the embedded V-MoE, and a small Mixtral trained on program code.

    python -m benchmarks.precision > benchmarks/precision.md

It takes some ten minutes of one core, where the Mixtral is kept from `benchmarks.tasks` (else it is trained first).
``--quick`` looks at 64 images and no text, and its numbers are worth no more than that.
"""

import argparse
import dataclasses
import functools
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from benchmarks.markdown import table
from benchmarks.tasks import TASKS
from cli.judge import judge
from exporter.export import export
from graph_passes.calibrate import calibrate
from graph_passes.graph.measure import measure as measure_graph
from graph_passes.graph.walk import constants, source
from graph_passes.model_file import load_graph, save_graph
from graph_passes.optimize import optimize
from graph_passes.precision import AS_IT_IS, Precision
from graph_passes.quantization.activations import Activations
from graph_passes.readers import read_blocks
from graph_passes.readers.sites import projection_before
from graph_passes.weights.stored import LazyWeight, of_constant
from graph_passes.weights.weight import byte_count
from models.vmoe.assets import fashion_mnist
from moe_spec.dataset import Dataset, load_dataset
from moe_spec.manifest import MODEL, OBSERVED
from moe_spec.plan import PruningPlan
from moe_spec.runner import LOGITS
from pruning.options import PlanOptions
from pruning.plan import make_plan
from runtime.backends import open_session
from runtime.measuring.machine import describe_machine
from runtime.model_dir import observed_file
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from runtime.verification.report import ParityReport
from runtime.verification.tolerances import TOLERANCES

THREADS, BATCH_SIZE, QUICK_EXAMPLES, TEXTS, RANGES = 1, 16, 64, 32, 256
RUNNER = OnnxRuntimeRunner(THREADS)
FORM = "sorted"
HALF = 0.5
CRITERION = "frequency"
CONFIDENT = 1.96

ROUNDED: Mapping[str, npt.DTypeLike] = {"bf16": ml_dtypes.bfloat16}
"""Formats that ONNX Runtime lacks: all weights but routers' are rounded to them, and arithmetic is float32's."""

WAYS: Sequence[tuple[str, str, Precision, bool]] = (
    ("fp32", "fp32", AS_IT_IS, False),
    ("fp16", "fp16", Precision("fp16", "fp16"), False),
    ("int8", "fp32", Precision("int8"), False),
    ("fp8", "fp32", Precision("fp8"), False),
    ("nvfp4", "fp32", Precision("nvfp4"), False),
    ("int4, blocks of 32", "fp32", Precision("int4", block_size=32), False),
    ("int8, activations too", "fp32", Precision("int8"), True),
    ("int8", "int8", Precision("int8", "int8"), False),
    ("fp8", "fp8", Precision("fp8", "fp8"), False),
    ("nvfp4", "nvfp4", Precision("nvfp4", "nvfp4"), False),
    ("int4, blocks of 32", "int4", Precision("int4", "int4", block_size=32), False),
    ("int8, activations too", "int8, activations too", Precision("int8", "int8"), True),
)
"""Experts, the rest, what is asked for, and whether activations are int8."""

_judge = functools.partial(judge, batch_size=BATCH_SIZE, threads=THREADS, bisect=False)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and its data.

    Attributes:
        name: of the task.
        exported: the whole model.
        plans: what is kept, by name.
        calibration: data that show ranges.
        test: data that it is judged on; labelled, or blocks of text.
    """

    name: str
    exported: Path
    plans: Mapping[str, PruningPlan | None]
    calibration: Activations
    test: Dataset


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one format."""

    task: str
    kept: str
    experts: str
    rest: str
    quality: str
    bytes: int
    report: ParityReport


def subject(name: str, checkpoint: Path, calibration: Path, test: Dataset, scratch: Path) -> Subject:
    """Export the model, and plan to keep half of its experts."""
    exported, statistics = scratch / "exported", scratch / "statistics.safetensors"
    export(checkpoint, exported, RUNNER, cache=False)
    calibrate(exported, calibration, statistics, RUNNER)
    half = make_plan(statistics, PlanOptions(HALF, CRITERION))
    shown = load_dataset(calibration, exported, limit=RANGES)
    plans = {"all": None, "half": half}
    return Subject(name, exported, plans, Activations(shown, calibration.name, batch_size=BATCH_SIZE), test)


def measure(subject: Subject, scratch: Path) -> list[Row]:
    """A row for each format, of the whole model and of half of its experts."""
    rows = []
    for kept, plan in subject.plans.items():
        losses_N: npt.NDArray[np.float64] | None = None
        for index, (experts, rest, precision, rounds) in enumerate(WAYS):
            print(f"{subject.name}, {kept} experts: {experts}, rest {rest}", file=sys.stderr)
            out = scratch / f"{kept}-{index}"
            how = subject.calibration if rounds else None
            optimize(
                subject.exported,
                out,
                RUNNER,
                plan=plan,
                any_model=True,
                form=FORM,
                precision=precision,
                activations=how,
            )
            report = _judge(out, subject.exported, plan=plan, data=subject.test)
            quality, losses_N = _quality(observed_file(out), subject.test, report, losses_N)
            rows.append(Row(subject.name, kept, experts, rest, quality, _weight_bytes(out), report))
            if precision == AS_IT_IS:
                rows += _rounded(subject, kept, out, losses_N)
    return rows


def _rounded(subject: Subject, kept: str, whole: Path, losses_N: npt.NDArray[np.float64] | None) -> list[Row]:
    """The float model with its weights rounded to other floats; both are files that know nothing of each other."""
    rows, bare = [], whole.with_name(f"{whole.name}-bare")
    bare.mkdir()
    save_rounded(whole / MODEL, bare / MODEL, np.float32)
    for name, dtype in ROUNDED.items():
        out = whole.with_name(f"{whole.name}-{name}")
        out.mkdir()
        saved = {file: save_rounded(whole / file, out / file, dtype) for file in (MODEL, OBSERVED)}
        tolerance = TOLERANCES[np.dtype(dtype).name]
        report = _judge(out / MODEL, bare / MODEL, data=subject.test, tolerance=tolerance)
        quality, _ = _quality(out / OBSERVED, subject.test, report, losses_N)
        rows.append(
            Row(subject.name, kept, f"{name}*", f"{name}*", quality, _weight_bytes(whole) - saved[MODEL], report)
        )
    return rows


def save_rounded(source_file: Path, target: Path, dtype: npt.DTypeLike) -> int:
    """Write an ONNX file, weights of two axes and more but routers' rounded; the bytes that the format would save."""
    graph = load_graph(source_file)
    blocks = read_blocks(graph, source_file.parent).blocks
    products = [projection_before(block.router.logits) for block in blocks]
    routers = {id(source(node.inputs[1])) for node in products if node is not None}
    saved = 0
    for tensor in constants(graph):
        weight = of_constant(tensor, source_file.parent)
        if weight.dtype == np.float32 and len(weight.shape) > 1 and id(tensor) not in routers:
            tensor._values = LazyWeight(weight.astype(dtype).astype(np.float32))
            saved += weight.nbytes - byte_count(weight.shape, np.dtype(dtype))
    save_graph(graph, source_file.parent, target)
    return saved


def _weight_bytes(directory: Path) -> int:
    """Of all constants; files have padding beside, so that weights can be mapped."""
    return measure_graph(load_graph(directory / MODEL), directory).bytes


def _quality(
    model: Path, test: Dataset, report: ParityReport, before_N: npt.NDArray[np.float64] | None
) -> tuple[str, npt.NDArray[np.float64] | None]:
    """Accuracy and by how much it differs, or perplexity and its ratio, both with 95 %; and losses to compare with."""
    if report.accuracy is not None:
        found = report.accuracy
        return f"{found.candidate:.1%} ({100 * found.low:+.1f} to {100 * found.high:+.1f})", None
    with open_session(model, THREADS) as session:
        parts = [
            _losses(session.run(feeds, [LOGITS])[LOGITS], feeds["input_ids"]) for feeds in test.batches(BATCH_SIZE)
        ]
    losses_N = np.concatenate(parts)
    perplexity = math.exp(losses_N.mean())
    before_N = losses_N if before_N is None else before_N
    low, high = interval(losses_N - before_N)
    return f"{perplexity:.1f} ({math.exp(low) - 1:+.1%} to {math.exp(high) - 1:+.1%})", before_N


def _losses(logits_NSV: npt.NDArray[np.float32], ids_NS: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """(N,): mean negative log-likelihood of the tokens of a block but the first."""
    logits_NSV = logits_NSV[:, :-1].astype(np.float64)
    peak_NS1 = logits_NSV.max(axis=-1, keepdims=True)
    total_NS = np.log(np.exp(logits_NSV - peak_NS1).sum(axis=-1)) + peak_NS1[..., 0]
    chosen_NS = np.take_along_axis(logits_NSV, ids_NS[:, 1:, None], axis=-1)[..., 0]
    mean_N: npt.NDArray[np.float64] = (total_NS - chosen_NS).mean(axis=1)
    return mean_N


def interval(differences_N: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Where the mean of what they are drawn from lies, with 95 % confidence.

    >>> interval(np.array([1.0, 1.0, 1.0]))
    (1.0, 1.0)
    """
    error = CONFIDENT * differences_N.std(ddof=1) / math.sqrt(len(differences_N))
    return float(differences_N.mean() - error), float(differences_N.mean() + error)


def report(rows: Sequence[Row], command: str) -> str:
    """The whole document."""
    head = ("task", "kept", "experts", "rest", "accuracy or perplexity", "bytes", "flips", "error", "forced", "verify")
    return f"""# What number formats cost

`{command}` printed this on {describe_machine()}.

*images* is the embedded V-MoE on its test images, *code* a Mixtral of 3.7 M parameters on {TEXTS} blocks of program
code that it has not seen (`benchmarks.tasks`). *kept* is the share of experts, by {CRITERION}; *rest* is what is
neither router nor expert, and routers are float32 everywhere. Formats are those of `moe-edge optimize`, in form
`{FORM}`.

Accuracy comes with its difference from the float model with the same experts, perplexity with what it is more, both
with 95 % confidence on the same examples. *bytes* are those of all weights and scales. *flips* are choices of experts
that differ, of all; *error* is the largest difference of an output over its largest magnitude, on examples without
flips, *forced* with the routing of the float model. *verify* is its verdict by its own tolerances.

{table(head, map(_cells, rows), left=4)}

\\* weights rounded and arithmetic float32: ONNX Runtime has no bfloat16 on a CPU. Bytes are what weights would take,
those of one axis in float32. nvfp4 was run as a table of its sixteen numbers: ONNX Runtime has no kernel of it.
"""


def _cells(row: Row) -> Sequence[str]:
    judged, layers = row.report, row.report.layers or ()
    flips = sum(layer.flips for layer in layers) / max(1, sum(layer.tokens for layer in layers))
    error, forced = (
        max((value for value in values if value is not None), default=None)
        for values in (
            [output.max_rel for output in judged.outputs],
            [output.forced_max_rel for output in judged.outputs],
        )
    )
    return (
        row.task,
        row.kept,
        row.experts,
        row.rest,
        row.quality,
        f"{row.bytes:,}",
        f"{flips:.2%}",
        "-" if error is None else f"{error:.1e}",
        "-" if forced is None else f"{forced:.1e}",
        "PASS" if judged.passed else "FAIL",
    )


def main() -> None:
    """Print the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 images and no text")
    quick = parser.parse_args().quick
    vmoe = fashion_mnist()
    limit = QUICK_EXAMPLES if quick else None
    images = load_dataset(vmoe / "test.npz", vmoe, limit=limit)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        rows += measure(
            subject("images", vmoe, vmoe / "calibration.npz", images, scratch / "images"), scratch / "images"
        )
        if not quick:
            task = TASKS["code"](0, lambda line: print(line, file=sys.stderr))
            text = task.read(task.test).part(0, TEXTS)
            code = subject("code", task.checkpoint, task.calibration, text, scratch / "code")
            rows += measure(code, scratch / "code")
    print(report(rows, "python -m benchmarks.precision" + (" --quick" if quick else "")), end="")


if __name__ == "__main__":
    main()
