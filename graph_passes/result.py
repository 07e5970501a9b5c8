"""What is known of a result while it is made: it goes from stage to stage, and ends as the manifest."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graph_passes.describe import Model, entry_of, io_of, tool_versions
from graph_passes.graph.emitter import Emitter, Names
from graph_passes.graph.measure import Size, measure, pass_entry
from graph_passes.graph.order import sort_nodes
from graph_passes.model_file import save_variant
from graph_passes.quantization.rest import to_details
from graph_passes.rewrite import Written
from graph_passes.settle import Settled, asked_before
from graph_passes.variants.observe import is_observable, observe_routing, routing_of
from moe_spec.identity import pruned_sha256
from moe_spec.manifest import OBSERVED, BlockEntry, FileEntry, Manifest, PassEntry, TensorSpec


@dataclasses.dataclass(frozen=True)
class Result:
    """A result so far; every attribute is one of its `Manifest`."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    blocks: tuple[BlockEntry, ...]
    passes: tuple[PassEntry, ...]
    details: Mapping[str, Any]

    def after(self, *passes: PassEntry, **details: Any) -> "Result":
        """The result once another stage is through, which ran ``passes`` and found ``details``."""
        return dataclasses.replace(self, passes=(*self.passes, *passes), details={**self.details, **details})


def observed_result(settled: Settled, written: Sequence[Written], staging: Path) -> Result:
    """The graph of ``settled``, as it was written to ``staging``; observed.onnx with its routers' tensors beside it."""
    inputs, outputs = io_of(settled.model.graph)
    passes = _passes(settled, measure(settled.model.graph, staging))
    return Result(inputs, outputs, _observe(settled.model, written, staging), passes, _details(settled))


def _passes(settled: Settled, after: Size) -> tuple[PassEntry, ...]:
    """What happened, in order: bytes go when experts do, nodes when forms are written."""
    before, decisions = settled.size, settled.decisions
    lost = [decision.read.nbytes - decision.pruned.nbytes for decision in decisions]
    unreached = sum(size for size, found in zip(lost, settled.findings, strict=True) if found is not None)
    planned = sum(lost) - unreached
    reached = Size(before.nodes, before.bytes - unreached)
    kept = Size(before.nodes, reached.bytes - planned)
    passes = (
        *settled.model.passes,
        pass_entry("delete-unreachable", unreached > 0, before, reached),
        pass_entry("prune-experts", planned > 0, reached, kept),
        pass_entry("write-blocks", any(decision.form is not None for decision in decisions), kept, after),
    )
    if settled.is_new:
        return passes
    return tuple(pass_entry(entry.name, False, before, before) for entry in passes)  # the file as it was


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


def _details(settled: Settled) -> Mapping[str, Any]:
    """What a manifest says besides, where no further stage is run."""
    model, findings = settled.model, [found for found in settled.findings if found]
    return {
        "oracle": [],
        "choices": [],
        "not_exercised": {},
        "precision": dataclasses.asdict(settled.wanted.precision.over(asked_before(model))),
        "precision_error": None,
        "rest": to_details(settled.rest),
        "activations": None if model.manifest is None else model.manifest.details.get("activations"),
        "casts": None,
        "left_alone": [str(layer) for layer in model.unrecognised],
        "unreachable": [dataclasses.asdict(item) for found in findings for item in found.unreachable],
        "not_proven": [dataclasses.asdict(item) for found in findings for item in found.not_proven],
    }


def manifest_of(settled: Settled, result: Result, files: tuple[FileEntry, ...]) -> Manifest:
    """The manifest of a directory that holds ``result`` in ``files``."""
    model, plan = settled.model, settled.wanted.plan
    return Manifest(
        kind="optimized",
        source_sha256=model.source_sha256,
        parent_sha256=model.parent_sha256,
        files=files,
        inputs=result.inputs,
        outputs=result.outputs,
        blocks=result.blocks,
        model_sha256=_model_sha256(settled, result.blocks),
        plan=plan if plan is not None else (None if model.manifest is None else model.manifest.plan),
        passes=result.passes,
        tools=tool_versions(),
        details=dict(result.details),
    )


def _model_sha256(settled: Settled, blocks: Sequence[BlockEntry]) -> str:
    """Identity of the result: that of the model where every expert is still there."""
    if all(decision.pruned.keep == decision.read.keep for decision in settled.decisions):
        return settled.model.model_sha256
    return pruned_sha256(settled.model.source_sha256, {block.name: block.keep for block in blocks})
