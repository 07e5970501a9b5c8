"""`verify` as a function: graphs are made of the two models that show what is compared, and are cut where it fails."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from moe_spec.cut import ForcedModel
from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.manifest import FILE_NAME, MODEL, OBSERVED, Manifest
from moe_spec.plan import PruningPlan
from runtime.backend import ENGINE
from runtime.bench import bench
from runtime.bisect import find_fault
from runtime.cut_run import CutPair
from runtime.providers import BY_DEFAULT, Execution
from runtime.report import ParityReport
from runtime.sides import Side
from runtime.tolerances import TOLERANCES, Tolerance
from runtime.verify import GREEDY_TOKENS, verify


def judge(
    candidate: Path,
    reference: Path,
    *,
    plan: PruningPlan | None = None,
    data: Dataset | None = None,
    tolerance: Tolerance | None = None,
    tolerances: Mapping[str, Tolerance] = TOLERANCES,
    batch_size: int = 32,
    threads: int = 0,
    execution: Execution = BY_DEFAULT,
    bisect: bool = True,
    greedy_tokens: int = GREEDY_TOKENS,
    cost: bool = False,
) -> ParityReport:
    """Compare ``candidate`` with what it was made from, whoever exported the two.

    Args:
        candidate: model or engine directory, or an .onnx file.
        reference: model directory or .onnx file; or the checkpoint that the candidate was exported from, which torch
            runs, as long as no expert is dropped.
        plan: what was applied to the candidate; by default the plan in its manifest.
        data: task data; without it both see random feeds.
        tolerance: what is allowed; by default the row of ``tolerances`` for the coarser model's number format.
        tolerances: by number format.
        batch_size: examples that are run at once.
        threads: that one operator may use on a CPU; 0 for one a core.
        execution: how ONNX Runtime is to run the candidate; the reference is run on the CPU.
        bisect: whether a candidate that fails is searched for the part that went wrong.
        greedy_tokens: so many tokens decoders write to be compared.
        cost: whether both are timed, by turns, as the candidate is run, and their memory is measured; of a checkpoint
            nothing is.

    Raises:
        UserError: a model is missing or damaged, cannot be run here, or the two are not comparable.
    """
    with tempfile.TemporaryDirectory(prefix="moe-edge-verify-") as directory:
        scratch = Path(directory)
        child = _observable(candidate, scratch / "candidate")
        in_torch = is_checkpoint(reference)
        parent = reference if in_torch else _reference(reference, candidate, plan, scratch / "reference")
        report = verify(
            child,
            _in_torch(reference, child, plan) if in_torch else parent,
            data,
            batch_size=batch_size,
            threads=threads,
            execution=execution,
            tolerance=tolerance,
            tolerances=tolerances,
            forced=_forced(candidate, scratch / "forced"),
            greedy_tokens=greedy_tokens,
        )
        if in_torch and not report.passed:
            report = report.with_note("to find the part at fault, export the checkpoint and give that as --reference")
        elif bisect and not report.passed:
            report = _with_fault(report, candidate, parent, scratch / "cut", data, batch_size, threads, execution)
    report = dataclasses.replace(
        report,
        candidate_sha256=_sha256(candidate, report.candidate_sha256),
        reference_sha256=_sha256(reference, report.reference_sha256),
    )
    if not cost:
        return report
    if in_torch:
        report = report.with_note("of a checkpoint neither latency nor memory is measured")
    timed = [candidate] if in_torch else [reference, candidate]
    return report.with_cost(bench(timed, [batch_size], threads=threads, execution=execution, data=data))


def _sha256(model: Path, of_copy: str) -> str:
    """Of the manifest of ``model`` itself, where it has one, not of the copy that ran."""
    manifest = model / FILE_NAME
    return sha256_file(manifest) if manifest.is_file() else of_copy


def home(model: Path) -> Path:
    """The directory of an .onnx file, or the model directory itself."""
    return model if model.is_dir() else model.parent


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is the directory of a checkpoint, rather than of a graph."""
    return (path / "config.json").is_file() and not (path / MODEL).exists() and any(path.glob("*.safetensors"))


def _in_torch(checkpoint: Path, candidate: Path, plan: PruningPlan | None) -> Side:
    if not (candidate / FILE_NAME).is_file():
        raise UserError(f"{candidate} is no model or engine directory", hint="check the path")
    like = Manifest.load(candidate)
    if plan is not None or like.plan is not None:
        raise UserError(
            f"{checkpoint} is a checkpoint, in which no plan is applied",
            hint="export it whole, and give that as --reference: moe-edge export CHECKPOINT -o exported/",
        )
    from exporter.torch_session import open_checkpoint

    session, manifest = open_checkpoint(checkpoint, like)
    return Side(checkpoint, manifest, session, observed=True)


def _is_engine(candidate: Path) -> bool:
    return (candidate / FILE_NAME).is_file() and Manifest.load(candidate).kind == ENGINE


def _observable(candidate: Path, scratch: Path) -> Path:
    """``candidate`` where its routers can be seen or it is an engine; else its graph with the routers as outputs."""
    is_known = (candidate / FILE_NAME).is_file()
    if not candidate.exists() or _is_engine(candidate) or (is_known and (candidate / OBSERVED).is_file()):
        return candidate
    from graph_passes.mask import mask_model

    mask_model(candidate, None, scratch)
    return scratch


def _reference(reference: Path, candidate: Path, plan: PruningPlan | None, scratch: Path) -> Path:
    """``reference`` where its routers can be seen and no plan has to be applied to it; else a graph made from it."""

    def plan_of(path: Path) -> PruningPlan | None:
        directory = home(path)
        return Manifest.load(directory).plan if (directory / FILE_NAME).is_file() else None

    applied, own = plan_of(candidate) if plan is None else plan, plan_of(reference)
    is_applied = own == applied and not (applied is not None and applied.shares_experts)  # gates are added up first
    missing = None if is_applied else applied
    if missing is None and (reference / OBSERVED).is_file():
        return reference
    from graph_passes.mask import mask_model

    mask_model(reference, missing, scratch)
    return scratch


def _forced(candidate: Path, scratch: Path) -> ForcedModel | None:
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
    report: ParityReport,
    candidate: Path,
    reference: Path,
    scratch: Path,
    data: Dataset | None,
    batch_size: int,
    threads: int,
    execution: Execution,
) -> ParityReport:
    """``report`` and the first part of ``candidate`` that went wrong, or a note of why none is named."""
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
    fault = find_fault(
        pair,
        reference,
        data,
        tolerance=report.tolerance,
        batch_size=batch_size,
        threads=threads,
        execution=execution,
    )
    uncut = [layer.name for layer in report.layers if layer.name not in names]
    if uncut:
        report = report.with_note(f"not cut, so a fault in them is told as one of what lies around: {', '.join(uncut)}")
    if fault is None:
        return report.with_note("no part by itself is out of tolerance: small differences add up")
    return report.with_fault(fault)
