"""ONNX to ONNX: delete the experts a plan drops, shrink the routers, write the form a target wants, prove it."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from graph_passes.block import MoEBlock
from graph_passes.describe import Model, io_of, read_model, tool_versions
from graph_passes.mask import save_masked
from graph_passes.model_file import load_graph, save_graph, save_variant, weight_bytes
from graph_passes.observe import observe_routing
from graph_passes.oracle import OracleEntry, check
from graph_passes.prune import match_layers, prune_block
from graph_passes.readers import read_blocks
from graph_passes.writers import AUTO, FORMS, WRITERS, choose_form, write_block
from graph_passes.writers.routing import Routing
from moe_spec.companions import copy_companions
from moe_spec.errors import UserError, did_you_mean
from moe_spec.files import new_directory, refuse_existing
from moe_spec.manifest import MODEL, OBSERVED, BlockEntry, Manifest, PassEntry, list_files
from moe_spec.plan import PruningPlan
from moe_spec.runner import Runner

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok",)
"""What config.json calls E and K, in the families that transformers knows."""

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Written:
    """One block as it went into the new graph."""

    block: MoEBlock
    form: str
    routing: Routing | None


def optimize(
    source: Path,
    out: Path,
    runner: Runner,
    *,
    plan: PruningPlan | None = None,
    form: str = AUTO,
    accepted: Sequence[str] = tuple(WRITERS),
    any_model: bool = False,
    prove: bool = True,
    allow_partial: bool = False,
    on_progress: Progress | None = None,
) -> Manifest:
    """Write the optimised form of ``source`` (an ONNX file or model directory) to the new directory ``out``.

    Args:
        source: whoever exported it.
        out: gets model.onnx, its weights, observed.onnx (router tensors as outputs), config.json, manifest.json.
        runner: runs original and result for the proof.
        plan: which experts stay; None keeps all.
        form: one of ``FORMS``; ``auto`` chooses for each layer among ``accepted``.
        accepted: the forms that the target takes, which also limit ``form``.
        any_model: take a plan that was made for another file of the same model, such as its checkpoint.
        prove: compare with the original whose dropped experts are unselectable, at three shapes.
        allow_partial: leave layers alone that no reader takes.
        on_progress: called with a step, and how much of it is done.

    Raises:
        UserError: unreadable input, an unrecognised layer, a plan that does not fit, a form that cannot express it.
        VerificationError: the proof failed; nothing is written.
    """
    refuse_existing(out)
    _check_form(form, accepted)
    model = read_model(source, allow_partial=allow_partial)
    if plan is not None and not any_model:
        plan.require_model(model.source_sha256, str(source))
    pruned = _prune(model, plan)
    before = (len(model.graph.nodes), weight_bytes(model.graph, model.path.parent))
    with new_directory(out) as staging:
        written = _write(model.graph, pruned, form, accepted)
        model.graph.cleanup().toposort()
        inputs, outputs = io_of(model.graph)
        save_graph(model.graph, model.path.parent, staging / MODEL, _weights_progress(on_progress))
        passes = _passes(model, plan, written, before, staging)
        entries = tuple(_entry(model.graph, item) for item in written)
        model.graph.toposort()
        save_variant(model.graph, staging / OBSERVED)
        proof = _prove(model.path, plan, staging, runner, out.parent) if prove else []
        copy_companions(model.path.parent, staging)
        _write_config(model.path.parent, staging, entries)
        manifest = Manifest(
            kind="optimized",
            source_sha256=model.source_sha256,
            parent_sha256=model.parent_sha256,
            files=list_files(staging),
            inputs=inputs,
            outputs=outputs,
            blocks=entries,
            plan=plan if plan is not None else (None if model.manifest is None else model.manifest.plan),
            passes=passes,
            tools=tool_versions(),
            details={
                "oracle": [dataclasses.asdict(entry) for entry in proof],
                "left_alone": [str(refusal) for refusal in model.refusals],
            },
        )
        manifest.save(staging)
    return manifest


def _check_form(form: str, accepted: Sequence[str]) -> None:
    if form != AUTO and form not in WRITERS:
        raise UserError(f"unknown form {form!r}", hint=did_you_mean(form, FORMS))
    if form != AUTO and form not in accepted:
        raise UserError(f"the target does not take form {form!r}", hint=f"it takes: {', '.join(accepted)}")


def _prune(model: Model, plan: PruningPlan | None) -> list[MoEBlock]:
    layers = match_layers(plan, model.blocks)
    return [
        block if layer is None else prune_block(block, layer) for block, layer in zip(model.blocks, layers, strict=True)
    ]


def _write(graph: gs.Graph, blocks: Sequence[MoEBlock], form: str, accepted: Sequence[str]) -> list[Written]:
    """Every block in its new form. The last goes first: a block may read what another one writes."""
    written = []
    for block in reversed(blocks):
        chosen = choose_form(block, accepted) if form == AUTO else form
        written.append(Written(block, chosen, write_block(graph, block, chosen)))
    return written[::-1]


def _weights_progress(on_progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if on_progress is None else lambda done, total: on_progress("writing weights", done, total)


def _passes(
    model: Model, plan: PruningPlan | None, written: Sequence[Written], before: tuple[int, int], staging: Path
) -> tuple[PassEntry, ...]:
    """What happened, in order: bytes go when experts are pruned, nodes when the form is written."""
    nodes, size = before
    after_nodes, after_size = len(model.graph.nodes), weight_bytes(model.graph, staging)
    dropped = sum(old.nbytes - item.block.nbytes for old, item in zip(model.blocks, written, strict=True))
    forms = "+".join(sorted({item.form for item in written}))
    return (
        PassEntry("prune-experts", plan is not None and dropped > 0, nodes, nodes, size, size - dropped),
        PassEntry(f"write-{forms}", True, nodes, after_nodes, size - dropped, after_size),
    )


def _entry(graph: gs.Graph, item: Written) -> BlockEntry:
    block, gates, scores = item.block, None, None
    if item.routing is not None:
        gates, scores = observe_routing(graph, block.name, item.routing, block.num_experts)
    return BlockEntry(
        name=block.name,
        experts=block.num_experts,
        top_k=block.router.top_k,
        keep=block.keep,
        router="" if item.routing is None else block.router.kind,
        form=item.form,
        bytes=block.nbytes,
        gates=gates,
        scores=scores,
    )


def _prove(
    original: Path, plan: PruningPlan | None, candidate: Path, runner: Runner, scratch: Path
) -> list[OracleEntry]:
    graph = load_graph(original)  # anew: the one that was read before has become the candidate
    blocks = read_blocks(graph, original.parent).blocks
    with tempfile.TemporaryDirectory(prefix=".reference.", dir=scratch) as reference:
        save_masked(graph, blocks, match_layers(plan, blocks), original.parent, Path(reference))
        return check(graph, Path(reference), candidate, runner)


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
