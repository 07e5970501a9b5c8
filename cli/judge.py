"""`verify` as a function: graphs are made of the two models that show what is compared, and are cut where it fails."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from cli.options import Against
from cli.sides import Opened, forced_model, graph_of, sides_of
from moe_spec.dataset import Dataset
from moe_spec.errors import UserError, VerificationError
from moe_spec.files import sha256_file
from moe_spec.identity import is_onnx, onnx_sha256
from moe_spec.manifest import FILE_NAME
from moe_spec.plan import PruningPlan
from moe_spec.progress import Progress, silent
from runtime.bench import BenchRow, bench
from runtime.execution import BY_DEFAULT, Execution
from runtime.model_dir import model_file, with_manifest
from runtime.onnx_file import locations_of
from runtime.verification.bisect import find_fault
from runtime.verification.cut_run import CutPair
from runtime.verification.report import ParityReport
from runtime.verification.sides import Side
from runtime.verification.tolerances import TOLERANCES, Tolerance
from runtime.verify import GREEDY_TOKENS, verify


@dataclasses.dataclass(frozen=True)
class _How:
    """What `judge` is told of how to run models."""

    data: Dataset | None
    batch_size: int
    threads: int
    execution: Execution
    trust_remote_code: bool
    on_progress: Progress


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
    trust_remote_code: bool = False,
    on_progress: Progress = silent,
) -> ParityReport:
    """Compare ``candidate`` with what it was made from, whoever exported the two.

    Args:
        candidate: model or engine directory, or an .onnx file; or a checkpoint, which torch runs.
        reference: likewise. Where the candidate lacks experts, a graph, or the checkpoint that it was made from.
        plan: what was applied to the candidate; by default the plan in its manifest.
        data: task data; without it both see random feeds.
        tolerance: what is allowed; by default the row of ``tolerances`` for the coarser model's number format.
        tolerances: by number format.
        batch_size: examples that are run at once.
        threads: that one operator may use on a CPU; 0 for one a core.
        execution: how ONNX Runtime is to run the candidate; the reference is run on the CPU.
        bisect: whether a candidate that fails is searched for the part that went wrong.
        greedy_tokens: so many tokens decoders write to be compared.
        cost: whether both are timed, by turns, as the candidate is run, and their memory is measured; checkpoints are
            run as transformers does by default.
        trust_remote_code: run the Python files that a checkpoint's config.json names (`models.own_code`).
        on_progress: told of all of it.

    Raises:
        UserError: a model is missing or damaged, cannot be run here, or the two are not comparable.
    """
    candidate, reference = map(with_manifest, (candidate, reference))
    with tempfile.TemporaryDirectory(prefix="moe-edge-verify-") as directory:
        scratch = Path(directory)
        child, parent = sides_of(candidate, reference, plan, scratch, trust_remote_code=trust_remote_code)
        report = verify(
            child,
            parent,
            data,
            batch_size=batch_size,
            threads=threads,
            execution=execution,
            tolerance=tolerance,
            tolerances=tolerances,
            forced=forced_model(candidate, scratch / "forced"),
            greedy_tokens=greedy_tokens,
            on_progress=on_progress,
        )
        how = _How(data, batch_size, threads, execution, trust_remote_code, on_progress)
        if bisect and not report.passed:
            faulty = child if isinstance(child, Side) else candidate
            try:
                report = _with_fault(report, faulty, parent, scratch, how)
            except UserError as error:  # of a report that is made already, nothing may be lost
                report = report.with_note(f"the part at fault is not known: {error.what}")
        if cost:
            try:
                report = report.with_cost(_cost(((reference, parent), (candidate, child)), how))
            except UserError as error:
                report = report.with_note(f"what both cost is not known: {error.what}")
    return dataclasses.replace(
        report,
        candidate_sha256=_sha256(candidate, report.candidate_sha256),
        reference_sha256=_sha256(reference, report.reference_sha256),
    )


def _sha256(model: Path, of_copy: str) -> str:
    """What ``model`` itself is called by what is made from it, not the copy that ran."""
    manifest = model / FILE_NAME
    if manifest.is_file():
        return sha256_file(manifest)
    return onnx_sha256(model_file(model), locations_of(model_file(model))) if is_onnx(model) else of_copy


def _cost(both: Sequence[tuple[Path, Opened]], how: _How) -> list[BenchRow]:
    """What each costs, in this order; a checkpoint is called as the other one is."""
    graphs = [model for model, side in both if not isinstance(side, Side)]
    checkpoints = [model for model, side in both if isinstance(side, Side)]
    measure = partial(
        bench,
        graphs,
        [how.batch_size if how.data is None else min(how.batch_size, len(how.data))],
        threads=how.threads,
        execution=how.execution,
        data=how.data,
        on_progress=how.on_progress,
    )
    if not checkpoints:
        return measure()
    from cli.against import InTorch

    like = next(side for _, side in both if not isinstance(side, Side))
    rivals = [InTorch(Against.EAGER, model, like, trust_remote_code=how.trust_remote_code) for model in checkpoints]
    rows = measure(rivals=rivals)
    return sorted(rows, key=lambda row: row.model == str(both[1][0]))  # the reference first; the sort is stable


def _with_fault(report: ParityReport, candidate: Opened, reference: Opened, scratch: Path, how: _How) -> ParityReport:
    """``report`` and the first part of the candidate that went wrong, or a note of why none is named."""
    try:
        from graph_passes.variants.cut import save_cut, save_watched
    except ModuleNotFoundError as missing:
        return report.with_note(
            f"the part at fault is not known: cutting graphs needs {missing.name}, moe-edge[optimize]"
        )
    if report.layers is None:
        return report.with_note(
            "an engine cannot be cut: verify the model that it was built from to find the part at fault"
        )
    try:
        ours, theirs = (
            graph_of(side, scratch / "exported", trust_remote_code=how.trust_remote_code)
            for side in (reference, candidate)
        )
    except (UserError, VerificationError) as error:
        return report.with_note(f"to find the part at fault a checkpoint is exported, and it is not: {error}")
    watched = save_watched(ours, scratch / "cut" / "reference")
    cut = save_cut(theirs, scratch / "cut" / "candidate", {layer.name for layer in watched.layers})
    names = [layer.name for layer in cut.layers]
    if not names:
        return report.with_note("no MoE layer could be cut out, so no part was looked at by itself")
    pair = CutPair(watched, save_cut(ours, scratch / "cut" / "reference", names), cut)
    fault = find_fault(
        pair,
        ours,
        how.data,
        tolerance=report.tolerance,
        batch_size=how.batch_size,
        threads=how.threads,
        execution=how.execution,
        on_progress=how.on_progress,
    )
    uncut = [layer.name for layer in report.layers if layer.name not in names]
    if uncut:
        report = report.with_note(f"not cut, so a fault in them is told as one of what lies around: {', '.join(uncut)}")
    if fault is None:
        return report.with_note("no part by itself is out of tolerance: small differences add up")
    return report.with_fault(fault)
