"""Prove that a candidate computes what its reference computes; exit with 3 when it does not.

Where a plan was applied to the candidate, its reference is the parent model with the dropped experts made unselectable;
that graph is made on the fly. Without --data both see random feeds at three shapes.

Example: moe-edge verify optimized/ --reference exported/ --data test.npz -o parity.json
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import console
from cli.options import AsJson
from moe_spec.errors import UserError, VerificationError

if TYPE_CHECKING:
    from moe_spec.cut import ForcedModel
    from moe_spec.dataset import Dataset
    from moe_spec.plan import PruningPlan
    from runtime.report import LayerParity, OutputParity, ParityReport


def verify(
    candidate: Annotated[Path, typer.Argument(help="Model or engine directory, or an .onnx file.")],
    reference: Annotated[Path, typer.Option(help="What it was made from: a model directory or an .onnx file.")],
    plan: Annotated[Path | None, typer.Option(help="plan.json; by default that in the candidate's manifest.")] = None,
    data: Annotated[Path | None, typer.Option(help=".npz of model inputs or images, with or without labels.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="parity.json; it must not exist yet.")] = None,
    precision: Annotated[str | None, typer.Option(help="Judge as float32, float16, bfloat16, int8 or int4.")] = None,
    tolerances: Annotated[Path | None, typer.Option(help='Other tolerances: {"int8": {"element": 0.05}}.')] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples that are run at once.")] = 32,
    threads: Annotated[int, typer.Option(min=0, help="Threads of one operator; 0: one a core.")] = 0,
    bisect: Annotated[bool, typer.Option(help="Search a failing candidate for the part that went wrong.")] = True,
    as_json: AsJson = False,
) -> None:
    """Prove that a candidate computes what its reference computes; exit with 3 when it does not.

    Example: moe-edge verify optimized/ --reference exported/ --data test.npz -o parity.json
    """
    from moe_spec.dataset import load_dataset
    from moe_spec.files import refuse_existing
    from moe_spec.images import ImagePreprocessor
    from moe_spec.plan import PruningPlan
    from runtime.tolerances import TOLERANCES, load_tolerances, tolerance_of
    from runtime.verify import verify as compare

    if output is not None:
        refuse_existing(output)
    rows = TOLERANCES if tolerances is None else load_tolerances(tolerances)
    tolerance = None if precision is None else tolerance_of(precision, rows)
    given = None if plan is None else PruningPlan.load(plan)
    preprocessors = (ImagePreprocessor.load(_home(path)) for path in (candidate, reference))
    preprocessor = next((found for found in preprocessors if found is not None), None)
    task = None if data is None else load_dataset(data, preprocessor)
    with tempfile.TemporaryDirectory(prefix="moe-edge-verify-") as scratch, console.status(f"verifying {candidate}"):
        parent = _reference(reference, candidate, given, Path(scratch) / "reference")
        child = _observable(candidate, Path(scratch) / "candidate")
        report = compare(
            child,
            parent,
            task,
            batch_size=batch_size,
            threads=threads,
            tolerance=tolerance,
            tolerances=rows,
            forced=_forced(candidate, Path(scratch) / "forced"),
        )
        if bisect and not report.passed:
            report = _with_fault(report, candidate, parent, Path(scratch) / "cut", task, batch_size, threads)
    if output is not None:
        report.save(output)
    console.result(_summary(report), report.to_json(), as_json)
    if not report.passed:
        raise VerificationError("; ".join([*report.reasons, _place(report)]))


def _home(model: Path) -> Path:
    """The directory of an .onnx file, or the model directory itself."""
    return model if model.is_dir() else model.parent


def _is_engine(candidate: Path) -> bool:
    from moe_spec.manifest import FILE_NAME, Manifest
    from runtime.backend import ENGINE

    return (candidate / FILE_NAME).is_file() and Manifest.load(candidate).kind == ENGINE


def _observable(candidate: Path, scratch: Path) -> Path:
    """``candidate`` where its routers can be seen or it is an engine; else its graph with the routers as outputs."""
    from moe_spec.manifest import FILE_NAME, OBSERVED

    is_known = (candidate / FILE_NAME).is_file()
    if not candidate.exists() or _is_engine(candidate) or (is_known and (candidate / OBSERVED).is_file()):
        return candidate
    from graph_passes.mask import mask_model

    mask_model(candidate, None, scratch)
    return scratch


def _reference(reference: Path, candidate: Path, plan: "PruningPlan | None", scratch: Path) -> Path:
    """``reference`` where its routers can be seen and no plan has to be applied to it; else a graph made from it."""
    from moe_spec.manifest import FILE_NAME, OBSERVED, Manifest

    def plan_of(path: Path) -> "PruningPlan | None":
        directory = _home(path)
        return Manifest.load(directory).plan if (directory / FILE_NAME).is_file() else None

    applied, own = plan_of(candidate) if plan is None else plan, plan_of(reference)
    is_applied = own == applied and not (applied is not None and applied.shares_experts)  # gates are added up first
    missing = None if is_applied else applied
    if missing is None and (reference / OBSERVED).is_file():
        return reference
    from graph_passes.mask import mask_model

    mask_model(reference, missing, scratch)
    return scratch


def _forced(candidate: Path, scratch: Path) -> "ForcedModel | None":
    """``candidate`` with its routing as inputs; None where there is no graph to change, or an op routes by itself."""
    if not candidate.exists() or _is_engine(candidate):
        return None
    try:
        from graph_passes.cut import save_forced_routing

        model = save_forced_routing(candidate, scratch)
    except (UserError, ModuleNotFoundError):
        return None
    return model if model.layers else None


def _with_fault(
    report: "ParityReport",
    candidate: Path,
    reference: Path,
    scratch: Path,
    data: "Dataset | None",
    batch_size: int,
    threads: int,
) -> "ParityReport":
    """``report`` and the first part of ``candidate`` that went wrong, or a note of why none is named."""
    from runtime.bisect import find_fault
    from runtime.cut_run import CutPair

    try:
        from graph_passes.cut import save_cut, save_watched
    except ModuleNotFoundError as missing:
        return report.with_note(
            f"the part at fault is not known: cutting graphs needs {missing.name}, moe-edge[optimize]"
        )
    if report.layers is None:
        return report.with_note(
            "an engine cannot be cut: verify the model that it was built from to find the part at fault"
        )
    watched = save_watched(reference, scratch / "reference")
    cut = save_cut(candidate, scratch / "candidate", {layer.name for layer in watched.layers})
    names = [layer.name for layer in cut.layers]
    if not names:
        return report.with_note("no MoE layer could be cut out, so no part was looked at by itself")
    pair = CutPair(watched, save_cut(reference, scratch / "reference", names), cut)
    fault = find_fault(pair, reference, data, tolerance=report.tolerance, batch_size=batch_size, threads=threads)
    uncut = [layer.name for layer in report.layers if layer.name not in names]
    if uncut:
        report = report.with_note(f"not cut, so a fault in them is told as one of what lies around: {', '.join(uncut)}")
    if fault is None:
        return report.with_note("no part by itself is out of tolerance: small differences add up")
    return report.with_fault(fault)


def _summary(report: "ParityReport") -> str:
    verdict = "PASS" if report.passed else "FAIL"
    flips = "flips not observable" if report.flips is None else f"{report.flips} flips"
    summary = f"{verdict}: {report.examples} examples of {report.data}, {report.precision}, {flips}"
    if report.accuracy is not None:
        summary += f", accuracy {report.accuracy.candidate:.1%} (reference {report.accuracy.reference:.1%})"
    layers = [_layer(layer) for layer in report.layers or ()]
    outputs = [_output(output) for output in _worst_of_cache(report.outputs)]
    return "\n".join([summary, *layers, *outputs, *_interval(report), *(f"  note: {note}" for note in report.notes)])


def _interval(report: "ParityReport") -> list[str]:
    if report.accuracy is None:
        return []
    low, high = (f"{100 * bound:+.1f}" for bound in (report.accuracy.low, report.accuracy.high))
    return [f"  accuracy: changes by {low} to {high} points, with 95 % confidence"]


def _worst_of_cache(outputs: Sequence["OutputParity"]) -> "list[OutputParity]":
    """A cache is an output for each tensor of each layer: one of them is shown."""
    from moe_spec.decoder import PRESENT

    kept = [output for output in outputs if output.name.startswith(PRESENT)]
    shown = [output for output in outputs if output not in kept]
    return shown + sorted(kept, key=lambda output: math.inf if output.max_rel is None else output.max_rel)[-1:]


def _layer(layer: "LayerParity") -> str:
    return (
        f"  {layer.name}: {layer.flips} of {layer.tokens} tokens flip, {layer.faults} without excuse, "
        f"agreement {layer.agreement:.4f}, gates differ by {_number(layer.gate_error)}"
    )


def _output(output: "OutputParity") -> str:
    forced = (
        "" if output.forced_max_rel is None else f"{_number(output.forced_max_rel)} under the reference's routing, "
    )
    return (
        f"  {output.name}: differs by {_number(output.max_rel)} on {output.examples} examples without flips, {forced}"
        f"cosine {_number(output.cosine)}, KL {_number(output.kl)}, same top-1 {_number(output.top1_agreement)}, "
        f"ESAP {_number(output.esap)}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _place(report: "ParityReport") -> str:
    if report.fault is not None:
        return f"the fault is in {report.fault.place}: {report.fault.says}"
    if report.first_wrong_layer is None:
        return "the routers of all layers agree"
    return f"the first layer that went wrong is {report.first_wrong_layer}"
