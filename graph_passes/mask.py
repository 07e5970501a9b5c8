"""The oracle's reference: the *original* graph with the dropped experts made unselectable.

-inf is added to their logits, which is what softmax and top-k see. Where a selection bias or groups decide (on scores
of which the dropped ones are now 0, and 0 plus a bias can still win), `UNSELECTABLE` is added to what is ranked too.
Nothing else changes, so what this graph computes is the definition of "these experts are gone".
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.block import MoEBlock
from graph_passes.describe import entry_of, io_of, read_model, tool_versions
from graph_passes.emitter import Emitter, Names
from graph_passes.model_file import link_weights, save_variant
from graph_passes.observe import mask_E, observe_routing, routing_of
from graph_passes.order import sort_nodes
from graph_passes.prune import match_layers
from graph_passes.walk import replace_reads
from graph_passes.writers.routing import UNSELECTABLE
from moe_spec.companions import copy_companions
from moe_spec.files import new_directory
from moe_spec.manifest import MODEL, OBSERVED, BlockEntry, Manifest, list_files
from moe_spec.plan import LayerPlan, PruningPlan


def mask_model(source: Path, plan: PruningPlan | None, out: Path) -> Manifest:
    """Write the reference for ``plan`` (None: nothing is masked) to the new directory ``out``, weights shared by link.

    The directory holds model.onnx, and observed.onnx with gates and scores of every layer as extra outputs. Layers that
    no reader takes stay as they are.

    Raises:
        UserError: no ONNX model, no layer that a reader takes, or a plan for other layers.
    """
    model = read_model(source, allow_partial=True)
    layers = match_layers(plan, model.blocks)
    with new_directory(out) as staging:
        names = Names(model.graph)
        save_masked(model.graph, names, model.blocks, layers, model.path.parent, staging)
        inputs, outputs = io_of(model.graph)
        entries = tuple(
            _observe(model.graph, Emitter(model.graph, block.name, names), block, layer)
            for block, layer in zip(model.blocks, layers, strict=True)
        )
        sort_nodes(model.graph)
        save_variant(model.graph, staging / OBSERVED)
        copy_companions(model.path.parent, staging)
        if (model.path.parent / "config.json").is_file():
            shutil.copyfile(model.path.parent / "config.json", staging / "config.json")
        manifest = Manifest(
            kind="reference",
            source_sha256=model.source_sha256,
            parent_sha256=model.parent_sha256,
            files=list_files(staging),
            inputs=inputs,
            outputs=outputs,
            blocks=entries,
            plan=plan,
            tools=tool_versions(),
        )
        manifest.save(staging)
    return manifest


def save_masked(
    graph: gs.Graph,
    names: Names,
    blocks: Sequence[MoEBlock],
    layers: Sequence[LayerPlan | None],
    source: Path,
    target: Path,
) -> None:
    """Mask ``graph`` in place and write it as ``target/model.onnx``, its weights linked from directory ``source``."""
    link_weights(graph, source, target)
    for block, layer in zip(blocks, layers, strict=True):
        if layer is not None:
            mask_block(Emitter(graph, block.name, names), block, layer.dropped)
    sort_nodes(graph)
    save_variant(graph, target / MODEL)


def mask_block(emitter: Emitter, block: MoEBlock, dropped: Sequence[int]) -> None:
    """Make the experts ``dropped`` of ``block`` unselectable, in place."""
    if not dropped:
        return
    router = block.router
    if router.selection_bias_E is not None or router.groups is not None:
        _add(emitter, router.choice, mask_E(block.num_experts, dropped, UNSELECTABLE))
    _add(emitter, router.logits, mask_E(block.num_experts, dropped, -np.inf))


def _add(emitter: Emitter, tensor: gs.Tensor, mask: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    """Let everything but the gather of weights read ``tensor + mask``; an output of the graph stays what it was."""
    untouched = [node for node in tensor.outputs if node.op == "GatherElements"]
    inner = emitter.within("masked")
    typed = inner.emit("CastLike", inner.array("mask", mask), tensor, label="typed_mask")
    masked = inner.emit("Add", tensor, typed, label="sum")
    replace_reads(tensor, masked, except_by=[masked.inputs[0], typed.inputs[0], *untouched])


def _observe(graph: gs.Graph, emitter: Emitter, block: MoEBlock, layer: LayerPlan | None) -> BlockEntry:
    routing = routing_of(emitter, block)
    dropped = () if layer is None else layer.dropped
    gates, scores = None, None
    if routing is not None:
        gates, scores = observe_routing(graph, emitter, routing, block.num_experts, dropped)
    return entry_of(block, gates, scores)
