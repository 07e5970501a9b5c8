"""ONNX to ONNX: delete the experts a plan drops, shrink the routers, write the form a target wants, prove it."""

import dataclasses
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from graph_passes.casts.assign import NO_BFLOAT16
from graph_passes.casts.proof import NOT_JUDGED
from graph_passes.casts.stage import Cast, cast_directory
from graph_passes.choice_readers import check_choice_is_unread
from graph_passes.config_file import write_config
from graph_passes.describe import read_model
from graph_passes.graph.measure import measure, pass_entry
from graph_passes.graph.order import tidy
from graph_passes.model_file import copy_weights, load_graph, save_graph
from graph_passes.precision import AS_IT_IS, Precision
from graph_passes.proof.prove import Work, prove_variant
from graph_passes.proof.prove import prove as prove_result
from graph_passes.quantization.activations import Activations, round_activations
from graph_passes.record.block import MoEBlock
from graph_passes.result import Result, manifest_of, observed_result
from graph_passes.rewrite import Written, carry_out
from graph_passes.settle import Settled, Wanted, settle
from graph_passes.variants.float4 import NOT_RUN, Float4Runner, save_for_cpu
from graph_passes.variants.force import save_forced
from graph_passes.variants.observe_experts import EXPERTS, save_experts_observed
from graph_passes.writers import AUTO
from moe_spec.companions import copy_companions
from moe_spec.files import new_directory, refuse_existing, sha256_file
from moe_spec.manifest import MODEL, OBSERVED, OBSERVED_CPU, Manifest, list_files
from moe_spec.plan import PruningPlan
from moe_spec.progress import Progress, silent
from moe_spec.runner import Runner


def optimize(
    source: Path,
    out: Path,
    runner: Runner,
    *,
    plan: PruningPlan | None = None,
    form: str = AUTO,
    accepted: Sequence[str] | None = None,
    tokens: int | None = None,
    precision: Precision = AS_IT_IS,
    accepted_precisions: Sequence[str] | None = None,
    activations: Activations | None = None,
    any_model: bool = False,
    prove: bool = True,
    forced: bool = False,
    observe_experts: bool = False,
    allow_partial: bool = False,
    on_progress: Progress = silent,
) -> Manifest:
    """Write the optimised form of ``source`` (an ONNX file or model directory) to the new directory ``out``.

    A model in which nothing goes and nothing changes its form is copied byte for byte.

    Args:
        source: whoever exported it.
        out: gets model.onnx, its weights, observed.onnx (router tensors as outputs), config.json, manifest.json.
        runner: runs original and result for the proof.
        plan: which experts stay. In layers that it does not name, all do that an input can choose.
        form: one of ``FORMS``; ``auto`` chooses for each layer among ``accepted``.
        accepted: the forms that the target takes, which also limit ``form``; None: no target in view, so that only
            what loses experts is written anew.
        tokens: how many a run has, where that is known; ``auto`` chooses for it.
        precision: formats of the experts and of the rest; what it does not name stays what it is.
        accepted_precisions: the formats that the target takes; None: no target in view.
        activations: data that tell how what int8 weights multiply is rounded to int8 too; None: it stays float.
        any_model: take a plan that was made for another file of the same model, such as its checkpoint.
        forced: write forced.onnx too, whose routing is an input (`graph_passes.variants.force`).
        observe_experts: write experts.onnx too, which gives logits, ids, weights and norms of what experts give
            (`graph_passes.variants.observe_experts`).
        prove: compare with the original whose dropped experts are unselectable, at three shapes.
        allow_partial: leave layers alone that no reader takes.
        on_progress: told of the bytes that are written; what is run for the proof the runner itself may tell.

    Raises:
        UserError: unreadable input, an unrecognised layer, a plan that does not fit, a form that cannot express it, a
            form or a precision that the target does not take, halves to cast.
        VerificationError: the proof failed; nothing is written.
    """
    refuse_existing(out)
    wanted = Wanted(plan, form, accepted, tokens, precision, accepted_precisions, activations)
    runner = Float4Runner(runner)
    settled = settle(read_model(source, allow_partial=allow_partial), wanted)
    model = settled.model
    with new_directory(out) as staging, ThreadPoolExecutor(1) as beside:
        written = carry_out(model.graph, settled.decisions)
        _save(settled, written, staging, on_progress)
        if plan is not None and not any_model:  # here, because a large model is hashed while its weights are written
            _require_model(plan, settled, source)
        hashes = beside.submit(_hash_weights, staging, settled)
        result = observed_result(settled, written, staging)
        if prove:
            result = _proven(result, settled, staging, runner, out.parent)
        if settled.activations is not None:
            on_progress("rounding activations")
            result = _rounded(result, staging, settled.activations, runner)
        cast = None
        if settled.formats is not None:
            on_progress("casting floats")
            cast = cast_directory(staging, result.blocks, settled.formats, runner if prove else None, out.parent)
            result = dataclasses.replace(result, inputs=cast.inputs, outputs=cast.outputs, blocks=cast.blocks)
            result = result.after(cast.entry, casts=None if cast.proof is None else dataclasses.asdict(cast.proof))
        result = result.after(not_run=_save_for_cpu(settled, cast, staging))
        result = result.after(forced=save_forced(staging) if forced else {})
        result = result.after(experts=save_experts_observed(staging) if observe_experts else {})
        if result.details["experts"] and prove:
            prove_variant(staging, EXPERTS, runner)
        copy_companions(model.path.parent, staging)
        write_config(model.path.parent, staging, result.blocks, are_all=not model.unrecognised)
        manifest = manifest_of(settled, result, list_files(staging, hashes.result()))
        manifest.save(staging)
    return manifest


def _save(settled: Settled, written: Sequence[Written], staging: Path, on_progress: Progress) -> None:
    """Write the graph; a model in which nothing is to be done is copied byte for byte."""
    model = settled.model
    if not settled.is_new:
        copy_weights(model.path, staging)
        shutil.copyfile(model.path, staging / MODEL)
        return
    tidy(model.graph)
    both = zip(model.blocks, written, strict=True)
    check_choice_is_unread(model.graph, [block for block, item in both if _chooses_anew(block, item.block)])
    save_graph(model.graph, model.path.parent, staging / MODEL, on_progress)


def _chooses_anew(read: MoEBlock, written: MoEBlock) -> bool:
    """Whether rows of its router went, so that it chooses among fewer."""
    return written.router.weight_EH.shape[0] < read.router.weight_EH.shape[0]


def _require_model(plan: PruningPlan, settled: Settled, source: Path) -> None:
    """A plan for the model at the start of the chain has its ids too, and names the number of experts of a layer."""
    if plan.model_sha256 != settled.model.source_sha256:
        plan.require_model(settled.model.model_sha256, str(source))


def _hash_weights(directory: Path, settled: Settled) -> dict[str, str]:
    """The hash of the data file, gigabytes of it perhaps, while the graph is looked at; not where it is cast yet."""
    data = directory / f"{MODEL}.data"
    return {data.name: sha256_file(data)} if data.is_file() and settled.formats is None else {}


def _proven(result: Result, settled: Settled, staging: Path, runner: Runner, scratch: Path) -> Result:
    """Compare the result with the original whose dropped experts are unselectable."""
    work = Work(settled.model, settled.wanted.plan, settled.layers, (), None)
    if settled.is_new:
        work = Work(settled.model, settled.wanted.plan, settled.layers, result.blocks, *settled.quantizations)
    proof = prove_result(work, staging, runner, scratch)
    return result.after(
        oracle=[dataclasses.asdict(entry) for entry in proof.oracle],
        choices=[dataclasses.asdict(entry) for entry in proof.choices.entries],
        not_exercised={name: list(experts) for name, experts in proof.choices.not_exercised.items()},
        precision_error=proof.precision_error,
    )


def _rounded(result: Result, staging: Path, how: Activations, runner: Runner) -> Result:
    """Round what int8 weights multiply to int8 too; nothing where an earlier run did."""
    before = measure(load_graph(staging / MODEL), staging)  # the graph at hand is observed by now
    rounded = round_activations(staging, how, runner)
    after = measure(load_graph(staging / MODEL), staging)
    result = result.after(pass_entry("round-activations", bool(rounded.ranges), before, after))
    if not rounded.ranges:
        return result
    told = {"format": "int8", "percentile": how.percentile, "data_sha256": how.data.sha256}
    measured = {"error": rounded.error, "examples": rounded.examples}
    return result.after(activations={**told, "ranges": dict(rounded.ranges), **measured})


def _save_for_cpu(settled: Settled, cast: Cast | None, staging: Path) -> list[str]:
    """Write observed.cpu.onnx, where weights are of 4-bit floats; what ONNX Runtime's CPU did not run of the proof."""
    has_float4 = save_for_cpu(staging / OBSERVED, staging / OBSERVED_CPU)
    has_bfloat16 = settled.formats is not None and settled.formats.has_bfloat16
    is_judged = has_bfloat16 or cast is None or cast.proof is None or bool(cast.proof.low)
    return [
        *([NOT_RUN] if has_float4 else []),
        *([NO_BFLOAT16] if has_bfloat16 else []),
        *([] if is_judged else [NOT_JUDGED]),
    ]
