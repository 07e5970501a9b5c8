"""ONNX to ONNX: delete the experts a plan drops, shrink the routers, write the form a target wants, prove it."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from graph_passes.casts import is_float32
from graph_passes.casts.assign import NO_BFLOAT16, Formats
from graph_passes.casts.stage import Cast, cast_directory
from graph_passes.choice_readers import check_choice_is_unread
from graph_passes.describe import Model, entry_of, io_of, read_model, tool_versions
from graph_passes.graph.emitter import Emitter, Names
from graph_passes.graph.measure import Size, measure, pass_entry
from graph_passes.graph.order import sort_nodes, tidy
from graph_passes.graph.qdq import rounds
from graph_passes.model_file import copy_weights, load_graph, save_graph, save_variant
from graph_passes.precision import AS_IT_IS, Precision
from graph_passes.proof.prove import Proof, Work, prove_variant
from graph_passes.proof.prove import prove as prove_result
from graph_passes.quantization.activations import Activations, Rounded, round_activations
from graph_passes.quantization.rest import Rest, check_routers_known, nodes_of, quantize_rest, to_details
from graph_passes.record.block import MoEBlock
from graph_passes.record.prune import match_layers
from graph_passes.rewrite import Decision, Written, carry_out, decide
from graph_passes.task_data import check_batches, fit_data
from graph_passes.unreachable import Findings
from graph_passes.variants.float4 import NOT_RUN, Float4Runner, save_for_cpu
from graph_passes.variants.force import save_forced
from graph_passes.variants.observe import is_observable, observe_routing, routing_of
from graph_passes.variants.observe_experts import EXPERTS, save_experts_observed
from graph_passes.writers import AUTO, FORMS, WRITERS
from moe_spec.companions import copy_companions
from moe_spec.errors import UserError, did_you_mean
from moe_spec.files import new_directory, refuse_existing, sha256_file
from moe_spec.identity import pruned_sha256
from moe_spec.manifest import MODEL, OBSERVED, OBSERVED_CPU, BlockEntry, Manifest, PassEntry, list_files
from moe_spec.plan import PruningPlan
from moe_spec.progress import Progress, silent
from moe_spec.runner import Runner

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok",)
"""What config.json calls E and K, in the families that transformers knows."""


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
        on_progress: called with a step, and how much of it is done.

    Raises:
        UserError: unreadable input, an unrecognised layer, a plan that does not fit, a form that cannot express it, a
            form or a precision that the target does not take, halves to cast.
        VerificationError: the proof failed; nothing is written.
    """
    refuse_existing(out)
    _check_form(form, accepted)
    precision.check_accepted(accepted_precisions)
    runner = Float4Runner(runner)
    accepted = _without_qmoe(form, accepted, activations)
    model = read_model(source, allow_partial=allow_partial)
    formats = _formats(model, precision)
    activations = _fitted(model, activations)
    layers = match_layers(plan, model.blocks)
    findings = [found if layer is None else None for found, layer in zip(model.findings, layers, strict=True)]
    layers = [layer if found is None else found.plan for layer, found in zip(layers, findings, strict=True)]
    decisions = [
        decide(block, layer, form, accepted, precision.quantization, tokens)
        for block, layer in zip(model.blocks, layers, strict=True)
    ]
    _check_pairs(decisions)
    before = measure(model.graph, model.path.parent)
    rest = _quantize_rest(model, precision)
    is_new = model.reduced or bool(rest.quantized) or any(decision.form is not None for decision in decisions)
    with new_directory(out) as staging, ThreadPoolExecutor(1) as beside:
        written = carry_out(model.graph, decisions)
        _save(model, staging, written, is_new, on_progress)
        if plan is not None and not any_model:  # here, because a large model is hashed while its weights are written
            _require_model(plan, model, source)
        hashed = None if formats is not None else beside.submit(_hash_weights, staging)
        inputs, outputs = io_of(model.graph)
        passes = _passes(model, decisions, findings, before, staging)
        if not is_new:  # the file as it was
            passes = tuple(pass_entry(entry.name, False, before, before) for entry in passes)
        entries = _observe(model, written, staging)
        hows = (precision.quantization, precision.rest_quantization if rest.quantized else None)
        work = Work(model, plan, layers, entries, *hows) if is_new else Work(model, plan, layers, (), None)
        proof = prove_result(work, staging, runner, out.parent) if prove else Proof()
        rounded: Rounded | None = None
        if activations is not None:
            floats = measure(load_graph(staging / MODEL), staging)  # the graph at hand is observed by now
            rounded = round_activations(staging, activations, runner)
            pairs = measure(load_graph(staging / MODEL), staging)
            passes = (*passes, pass_entry("round-activations", bool(rounded.ranges), floats, pairs))
        cast: Cast | None = None
        if formats is not None:
            cast = cast_directory(staging, entries, formats, runner if prove else None, out.parent)
            inputs, outputs, entries, passes = cast.inputs, cast.outputs, cast.blocks, (*passes, cast.entry)
        has_float4 = save_for_cpu(staging / OBSERVED, staging / OBSERVED_CPU)
        forced_inputs = save_forced(staging) if forced else {}
        experts_outputs = save_experts_observed(staging) if observe_experts else {}
        if experts_outputs and prove:
            prove_variant(staging, EXPERTS, runner)
        copy_companions(model.path.parent, staging)
        _write_config(model.path.parent, staging, entries)
        manifest = Manifest(
            kind="optimized",
            source_sha256=model.source_sha256,
            parent_sha256=model.parent_sha256,
            files=list_files(staging, {} if hashed is None else hashed.result()),
            inputs=inputs,
            outputs=outputs,
            blocks=entries,
            model_sha256=_model_sha256(model, decisions, entries),
            plan=plan if plan is not None else (None if model.manifest is None else model.manifest.plan),
            passes=passes,
            tools=tool_versions(),
            details={
                "oracle": [dataclasses.asdict(entry) for entry in proof.oracle],
                "choices": [dataclasses.asdict(entry) for entry in proof.choices],
                "forced": forced_inputs,
                "experts": experts_outputs,
                "precision": dataclasses.asdict(precision.over(_asked_before(model))),
                "precision_error": proof.precision_error,
                "rest": to_details(rest),
                "activations": _activations_entry(model, activations, rounded),
                "not_run": [*([NOT_RUN] if has_float4 else []), *([NO_BFLOAT16] if _is_bfloat16(formats) else [])],
                "casts": None if cast is None or cast.proof is None else dataclasses.asdict(cast.proof),
                "left_alone": [str(layer) for layer in model.unrecognised],
                "unreachable": [dataclasses.asdict(item) for found in findings if found for item in found.unreachable],
                "not_proven": [dataclasses.asdict(item) for found in findings if found for item in found.not_proven],
            },
        )
        manifest.save(staging)
    return manifest


def _quantize_rest(model: Model, precision: Precision) -> Rest:
    """Quantise what is neither router nor expert, if that is asked for; before any block is written anew.

    Raises:
        UserError: nobody knows what the router of a layer is.
    """
    if precision.rest_quantization is None:
        return Rest()
    check_routers_known([*(entry.layer for entry in model.unrecognised), *(entry.name for entry in model.choosing)])
    return quantize_rest(model.graph, model.path.parent, model.blocks, precision.rest_quantization)


def _is_bfloat16(formats: Formats | None) -> bool:
    return formats is not None and formats.has_bfloat16


def _asked_before(model: Model) -> Mapping[str, Any]:
    """What an earlier run was asked for."""
    return ({} if model.manifest is None else model.manifest.details.get("precision")) or {}


def _formats(model: Model, precision: Precision) -> Formats | None:
    """What has to be cast; None where nothing has, or an earlier run did just that.

    Raises:
        UserError: the model is not float32.
    """
    before = _asked_before(model)
    if is_float32(model.graph) or not precision.asks_for_floats:
        return precision.formats
    if before and precision.over(before) == Precision().over(before):
        return None
    raise UserError(
        f"{model.path} is of halves already, and casts start from float32",
        hint="optimise the float32 model with --precision and --rest-precision; moe-edge export writes one",
    )


def _without_qmoe(form: str, accepted: Sequence[str] | None, activations: Activations | None) -> Sequence[str] | None:
    """The forms that remain where activations are int8: what a fused op does inside cannot be rounded.

    Raises:
        UserError: ``form`` is not among them.
    """
    if activations is None:
        return accepted
    if form == "qmoe":
        raise UserError(
            "form qmoe computes with float activations inside its op",
            hint="leave --activations out, or choose another --form",
        )
    return None if accepted is None else [name for name in accepted if name != "qmoe"]


def _fitted(model: Model, activations: Activations | None) -> Activations | None:
    """``activations`` with the data as the graph takes them.

    Raises:
        UserError: they do not fit.
    """
    if activations is None:
        return None
    inputs, _ = io_of(model.graph)
    check_batches(activations.data, inputs, activations.batch_size, str(model.path))
    return dataclasses.replace(activations, data=fit_data(activations.data, inputs, activations.name))


def _check_pairs(decisions: Sequence[Decision]) -> None:
    """Refuse to write anew what rounds its activations: that would be lost.

    Raises:
        UserError: a layer is such.
    """
    for decision in decisions:
        if decision.form is not None and rounds(nodes_of(decision.read)):
            raise UserError(
                f"layer {decision.read.name} rounds its activations, which would be lost where it is written anew",
                hint="prune, quantise and write the model that had float activations, with --activations int8",
            )


def _activations_entry(model: Model, how: Activations | None, rounded: Rounded | None) -> Any:
    """What the manifest says of int8 activations: of this run, or of the one before."""
    if how is None or rounded is None or not rounded.ranges:
        return None if model.manifest is None else model.manifest.details.get("activations")
    told = {"format": "int8", "percentile": how.percentile, "data_sha256": how.data.sha256}
    return {**told, "ranges": dict(rounded.ranges), "error": rounded.error}


def _require_model(plan: PruningPlan, model: Model, source: Path) -> None:
    """A plan for the model at the start of the chain has its ids too, and names the number of experts of a layer."""
    if plan.model_sha256 != model.source_sha256:
        plan.require_model(model.model_sha256, str(source))


def _model_sha256(model: Model, decisions: Sequence[Decision], entries: Sequence[BlockEntry]) -> str:
    if all(decision.pruned.keep == decision.read.keep for decision in decisions):
        return model.model_sha256
    return pruned_sha256(model.source_sha256, {entry.name: entry.keep for entry in entries})


def _check_form(form: str, accepted: Sequence[str] | None) -> None:
    if form != AUTO and form not in WRITERS:
        raise UserError(f"unknown form {form!r}", hint=did_you_mean(form, FORMS))
    if form != AUTO and accepted is not None and form not in accepted:
        raise UserError(f"the target does not take form {form!r}", hint=f"it takes: {', '.join(accepted)}")


def _save(model: Model, staging: Path, written: Sequence[Written], is_new: bool, on_progress: Progress) -> None:
    """Write the graph; a model in which nothing is to be done is copied byte for byte."""
    if not is_new:
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


def _hash_weights(directory: Path) -> dict[str, str]:
    """The hash of the data file, gigabytes of it perhaps, while the graph is looked at."""
    data = directory / f"{MODEL}.data"
    return {data.name: sha256_file(data)} if data.is_file() else {}


def _passes(
    model: Model, decisions: Sequence[Decision], findings: Sequence[Findings | None], before: Size, staging: Path
) -> tuple[PassEntry, ...]:
    """What happened, in order: bytes go when experts do, nodes when forms are written."""
    lost = [decision.read.nbytes - decision.pruned.nbytes for decision in decisions]
    unreached = sum(size for size, found in zip(lost, findings, strict=True) if found is not None)
    planned = sum(lost) - unreached
    reached = Size(before.nodes, before.bytes - unreached)
    kept = Size(before.nodes, reached.bytes - planned)
    return (
        *model.passes,
        pass_entry("delete-unreachable", unreached > 0, before, reached),
        pass_entry("prune-experts", planned > 0, reached, kept),
        pass_entry(
            "write-blocks",
            any(decision.form is not None for decision in decisions),
            kept,
            measure(model.graph, staging),
        ),
    )


def _observe(model: Model, written: Sequence[Written], staging: Path) -> tuple[BlockEntry, ...]:
    """Save the variant that has the routers' tensors as outputs; the blocks, and the names of these outputs."""
    names, entries = Names(model.graph), []
    for item in written:
        if not is_observable(item.block):
            entries.append(entry_of(item.block))
            continue
        emitter = Emitter(model.graph, item.block.name, names)
        routing = item.routing if item.rewritten else routing_of(emitter, item.block)
        if routing is not None:
            observed = observe_routing(model.graph, emitter, item.block, routing)
            entries.append(entry_of(item.block, *observed))
        elif item.rewritten:  # no router is left
            entries.append(dataclasses.replace(entry_of(item.block), router=""))
        else:
            entries.append(entry_of(item.block))
    sort_nodes(model.graph)
    save_variant(model.graph, staging / OBSERVED)
    return _in_order(model, entries)


def _in_order(model: Model, entries: Sequence[BlockEntry]) -> tuple[BlockEntry, ...]:
    """``entries`` and those of layers that were settled before, in the order of the manifest that names them all."""
    unobserved = (dataclasses.replace(entry, gates=None, scores=None) for entry in model.settled)
    by_name = {entry.name: entry for entry in (*entries, *unobserved)}
    order = [entry.name for entry in (model.manifest.blocks if model.manifest is not None else entries)]
    return tuple(by_name[name] for name in order if name in by_name)


def _write_config(source: Path, target: Path, blocks: Sequence[BlockEntry]) -> None:
    """config.json with the new counts, where the source has one."""
    config = source / "config.json"
    if config.is_file():
        values = _with_counts(json.loads(config.read_text(encoding="utf-8")), blocks)
        (target / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_counts(config: dict[str, Any], blocks: Sequence[BlockEntry]) -> dict[str, Any]:
    """``config`` with the new E and K where all layers agree, and both per layer in any case."""
    counts = {
        **{key: {block.experts for block in blocks} for key in EXPERT_COUNT_KEYS},
        **{key: {block.top_k for block in blocks} for key in TOP_K_KEYS},
    }
    agreed = {key: next(iter(values)) for key, values in counts.items() if key in config and len(values) == 1}
    per_layer = {block.name: {"experts": block.experts, "top_k": block.top_k} for block in blocks}
    return {**config, **agreed, "moe_edge": per_layer}
