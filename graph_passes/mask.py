"""The oracle's reference: the *original* graph with the dropped experts made unselectable.

-inf is added to their logits, which is what softmax and top-k see. Where a selection bias or groups decide (on scores
of which the dropped ones are now 0, and 0 plus a bias can still win), `UNSELECTABLE` is added to what is ranked too.
Nothing else changes, so what this graph computes is the definition of "these experts are gone".
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx.external_data_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from graph_passes.block import MoEBlock
from graph_passes.describe import io_of, read_model, tool_versions
from graph_passes.emitter import Emitter
from graph_passes.model_file import constants, save_variant
from graph_passes.observe import mask_E, observe_routing
from graph_passes.prune import match_layers
from graph_passes.walk import replace_uses
from graph_passes.writers.routing import UNSELECTABLE, Routing
from moe_spec.companions import copy_companions
from moe_spec.files import inside, new_directory
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
        save_masked(model.graph, model.blocks, layers, model.path.parent, staging)
        inputs, outputs = io_of(model.graph)
        entries = tuple(_observe(model.graph, *pair) for pair in zip(model.blocks, layers, strict=True))
        model.graph.toposort()
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
    graph: gs.Graph, blocks: Sequence[MoEBlock], layers: Sequence[LayerPlan | None], source: Path, target: Path
) -> None:
    """Mask ``graph`` in place and write it as ``target/model.onnx``, its weights linked from directory ``source``."""
    _link_weights(graph, source, target)
    for block, layer in zip(blocks, layers, strict=True):
        if layer is not None:
            mask_block(graph, block, layer.dropped)
    graph.toposort()
    save_variant(graph, target / MODEL)


def mask_block(graph: gs.Graph, block: MoEBlock, dropped: Sequence[int]) -> None:
    """Make the experts ``dropped`` of ``block`` unselectable, in place."""
    if not dropped:
        return
    router = block.router
    if router.selection_bias_E is not None or router.groups is not None:
        _add(graph, block.name, router.choice, mask_E(block.num_experts, dropped, UNSELECTABLE))
    _add(graph, block.name, router.logits, mask_E(block.num_experts, dropped, -np.inf))


def _add(graph: gs.Graph, scope: str, tensor: gs.Tensor, mask: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    """Let everything but the gather of weights read ``tensor + mask``."""
    untouched = [node for node in tensor.outputs if node.op == "GatherElements"]
    emitter = Emitter(graph, f"{scope}/masked")
    typed = emitter.emit("CastLike", emitter.array("mask", mask), tensor, label="typed_mask")
    masked = emitter.emit("Add", tensor, typed, label="sum")
    replace_uses(graph, tensor, masked, except_by=[masked.inputs[0], typed.inputs[0], *untouched])


def _observe(graph: gs.Graph, block: MoEBlock, layer: LayerPlan | None) -> BlockEntry:
    router = block.router
    producer = router.ids.inputs[0]
    ranked = producer.inputs[0] if producer.op == "TopK" else router.ranked
    emitter = Emitter(graph, f"{block.name}/slots")  # batched_mm hands its weights over as (T K, 1)
    ids, weights = (emitter.reshape(slots, (-1, router.top_k), "rows") for slots in (router.ids, router.weights))
    routing = Routing(ranked, ids_TK=ids, weights_TK=weights)
    dropped = () if layer is None else layer.dropped
    gates, scores = observe_routing(graph, block.name, routing, block.num_experts, dropped)
    return BlockEntry(
        name=block.name,
        experts=block.num_experts,
        top_k=router.top_k,
        keep=block.keep,
        router=router.kind,
        form=block.form,
        bytes=block.nbytes,
        gates=gates,
        scores=scores,
    )


def _link_weights(graph: gs.Graph, source: Path, target: Path) -> None:
    """Put the graph's external data files into ``target``, without a copy where the file system allows."""
    locations = set()
    for tensor in constants(graph):
        values = tensor._values
        if isinstance(values, LazyValues) and onnx.external_data_helper.uses_external_data(values.tensor):
            locations.add(onnx.external_data_helper.ExternalDataInfo(values.tensor).location)
    for location in locations:
        original, link = inside(source, location, source / MODEL), inside(target, location, target / MODEL)
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(original.resolve(), link)
        except OSError:  # another file system
            shutil.copyfile(original, link)
