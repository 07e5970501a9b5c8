"""The oracle's reference: the *original* graph with the dropped experts made unselectable.

-inf is added to their logits, which is what softmax and top-k see. Where a selection bias or groups decide (on scores
of which the dropped ones are now 0, and 0 plus a bias can still win), `UNSELECTABLE` is added to what is ranked too.
Nothing else changes, so what this graph computes is the definition of "these experts are gone".

Where fewer experts are left than the router selects, it still selects K: dropped ones too, which have to count 0. A
score of 0 does. Two kinds of routers need help, because they choose one by one and set to -inf what they have taken:
among nothing but -inf, the second choice is the first again, or NaN. So they see `UNSELECTABLE`, of which a softmax
is 0 as well. And the sparsemixer's softmax over the rivals of a dropped expert is not 0: its weight is set to 0.

Layers that a plan leaves their whole router keep their logits, and lose the gates: `silence`; what takes the place of
experts is added: `replace`. Layers that it merges get their means first: `twin`.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.describe import entry_of, io_of, read_model, tool_versions
from graph_passes.graph.emitter import Emitter, Names
from graph_passes.graph.order import sort_nodes
from graph_passes.graph.walk import producer, replace_reads
from graph_passes.model_file import link_weights, load_graph, save_variant
from graph_passes.proof.replace import replace_block
from graph_passes.proof.silence import silence_block, zero_slots
from graph_passes.proof.twin import merged, save_twin
from graph_passes.readers import read_blocks
from graph_passes.record.block import MoEBlock, Router
from graph_passes.record.merge import merges
from graph_passes.record.prune import match_layers, prune_block, require_rows
from graph_passes.variants.observe import Mask, is_observable, mask_E, observe_routing, routing_of
from graph_passes.writers.groups import UNSELECTABLE
from moe_spec.companions import copy_companions
from moe_spec.files import new_directory
from moe_spec.layer_plan import ALIAS, REPLACE, UNTOUCHED, LayerPlan
from moe_spec.manifest import MODEL, OBSERVED, BlockEntry, Manifest, list_files
from moe_spec.plan import PruningPlan

LOW_IN_HALF = -3e4
"""`UNSELECTABLE` for float16: twice this is finite too, and a softmax of it is 0."""


def mask_model(source: Path, plan: PruningPlan | None, out: Path) -> Manifest:
    """Write the reference for ``plan`` (None: nothing is masked) to the new directory ``out``, weights shared by link.

    Where the plan merges experts that differ, they have weights of their own. The directory holds model.onnx, and
    observed.onnx with gates and scores of every layer as extra outputs. Layers that no reader takes stay as they are.

    Raises:
        UserError: no ONNX model, no layer that a reader takes, or a plan for other layers.
    """
    model = read_model(source, allow_partial=True)
    layers = match_layers(plan, model.blocks)
    for block, layer in zip(model.blocks, layers, strict=True):
        if layer is not None:
            prune_block(block, layer)  # refused for the same reasons; nothing is read
    with new_directory(out) as staging, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        path, graph, blocks = model.path, model.graph, model.blocks
        if any(map(merges, blocks, layers)):
            path = save_twin(path, layers, merged, Path(scratch) / "merged")
            graph = load_graph(path)
            again = zip(read_blocks(graph, path.parent).blocks, blocks, strict=True)
            blocks = tuple(dataclasses.replace(block, name=known.name, keep=known.keep) for block, known in again)
        names = Names(graph)
        without = save_masked(graph, names, blocks, layers, path.parent, staging)
        inputs, outputs = io_of(graph)
        entries = save_observed(graph, names, without, layers, staging)
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
            model_sha256=model.model_sha256,
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
) -> list[MoEBlock]:
    """Mask ``graph`` in place and write it as ``target/model.onnx``, its weights linked from directory ``source``.

    Gives the blocks with the values that they have now.
    """
    link_weights(graph, source, target)
    masked = [
        block if layer is None else _without_dropped(graph, Emitter(graph, block.name, names), block, layer)
        for block, layer in zip(blocks, layers, strict=True)
    ]
    sort_nodes(graph)
    save_variant(graph, target / MODEL)
    return masked


def save_observed(
    graph: gs.Graph, names: Names, blocks: Sequence[MoEBlock], layers: Sequence[LayerPlan | None], target: Path
) -> tuple[BlockEntry, ...]:
    """Write ``graph`` as ``target/observed.onnx``, the routers of ``blocks`` observed; what their outputs are called.

    Its weights lie in ``target`` already.
    """
    entries = []
    for block, layer in zip(blocks, layers, strict=True):
        emitter = Emitter(graph, block.name, names)
        masked, silent = _dropped(layer)
        if not is_observable(block):
            entries.append(entry_of(block))
            continue
        routing = routing_of(emitter, block, masked)
        shared = layer.survivor_of if layer is not None and layer.router == ALIAS else ()
        observed = observe_routing(graph, emitter, block, routing, masked, silent, shared)
        entries.append(entry_of(block, *observed))
    sort_nodes(graph)
    save_variant(graph, target / OBSERVED)
    return tuple(entries)


def _dropped(layer: LayerPlan | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(experts that ``layer`` makes unselectable, those whose gates it sets to 0)."""
    if layer is None or layer.router == ALIAS:
        return (), ()
    return ((), layer.dropped) if layer.router in UNTOUCHED else (layer.dropped, ())


def _without_dropped(graph: gs.Graph, emitter: Emitter, block: MoEBlock, layer: LayerPlan) -> MoEBlock:
    require_rows(block, layer)
    if layer.router == REPLACE:
        return replace_block(graph, emitter, block, layer)
    masked, silent = _dropped(layer)
    return mask_block(emitter, silence_block(emitter, block, silent), masked)


def mask_block(emitter: Emitter, block: MoEBlock, dropped: Sequence[int]) -> MoEBlock:
    """Make the experts ``dropped`` of ``block`` unselectable, in place; the block with the values that it has now."""
    emitter, router = emitter.within("masked"), block.router
    experts = block.num_experts - router.unranked  # columns that the graph has
    dropped = [expert for expert in dropped if expert < experts]
    if not dropped:
        return block
    logits, choice = router.logits, router.choice
    if router.selection_bias_E is not None or router.groups is not None:
        choice = _add(emitter, choice, mask_E(experts, dropped, _finite(router)), _ranking(router))
    value = _finite(router) if _chooses_one_by_one(router) else -np.inf
    logits = _add(emitter, logits, mask_E(experts, dropped, value), list(logits.outputs))
    now = {id(router.logits): logits, id(router.choice): choice}
    slots = router.slots
    if slots is not None and router.score == "sparsemixer" and experts - len(dropped) < router.top_k:
        slots = zero_slots(emitter, slots, 1 - mask_E(experts, dropped, 1.0))
    ranked = now.get(id(router.ranked), router.ranked)
    return dataclasses.replace(
        block, router=dataclasses.replace(router, logits=logits, choice=choice, ranked=ranked, slots=slots)
    )


def _finite(router: Router) -> float:
    """What makes an expert unselectable without being -inf, in the router's dtype."""
    return LOW_IN_HALF if router.weight_EH.dtype == np.float16 else UNSELECTABLE


def _chooses_one_by_one(router: Router) -> bool:
    return router.top_k > 1 and any(node.op == "ArgMax" for node in router.ranked.outputs)


def _ranking(router: Router) -> list[gs.Node]:
    """The readers of ``router.choice`` that lead to the choice, rather than to the weights."""
    if router.choice is router.ranked:
        return [node for node in router.choice.outputs if node.op in ("TopK", "ArgMax", "QMoE")]
    leading: dict[int, gs.Node] = {}
    front = [producer(router.ranked)]
    while front:
        node = front.pop()
        if node is not None and id(node) not in leading and node.op != "Shape":
            leading[id(node)] = node
            ends = (router.choice, router.logits)
            front.extend(producer(tensor) for tensor in node.inputs if all(tensor is not end for end in ends))
    return [node for node in router.choice.outputs if id(node) in leading]


def _add(emitter: Emitter, tensor: gs.Tensor, mask: Mask, readers: Sequence[gs.Node]) -> gs.Variable:
    """``tensor + mask``, which ``readers`` read from now on; an output of the graph stays what it was."""
    others = [node for node in tensor.outputs if all(node is not reader for reader in readers)]
    typed = emitter.emit("CastLike", emitter.array("mask", mask), tensor, label="typed_mask")
    masked: gs.Variable = emitter.emit("Add", tensor, typed, label="sum")
    replace_reads(tensor, masked, except_by=[masked.inputs[0], typed.inputs[0], *others])
    return masked
