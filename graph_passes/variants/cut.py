"""A model cut at its MoE layers, so that each part can be given what the same part of another model was given.

Around a fault everything that follows is wrong too. So the graph is cut where the hidden states enter the experts of a
layer, and where their sum leaves them: what was computed up to there becomes an output, and what follows reads an input
instead. One run of a cut model is then a run of all its parts, none of which has seen the faults of another. Engines
are strongly typed and cannot be bisected by changing the precision of layers; this needs no such thing.

The experts' ids and weights are inputs too (`force`), so that routers and experts are parts of their own, and so is,
with every token sent to one of them, each expert.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.describe import inspect_model
from graph_passes.graph.emitter import FLOAT, Emitter, Names
from graph_passes.graph.order import sort_nodes
from graph_passes.graph.walk import source
from graph_passes.model_file import link_weights, save_variant
from graph_passes.record.block import MoEBlock
from graph_passes.variants.float4 import save_for_cpu
from graph_passes.variants.force import FORCED, force_routing, read_instead
from graph_passes.variants.observe import is_observable, observe_routing, routing_of
from moe_spec.cut import CutLayer, CutModel, ForcedLayer, ForcedModel, WatchedLayer, WatchedModel
from moe_spec.errors import UserError

L = TypeVar("L")

WATCHED, CUT = "watched.onnx", "cut.onnx"


def save_watched(model: Path, out: Path) -> WatchedModel:
    """Write ``model`` to directory ``out`` with the values at its cuts as outputs, and nothing cut.

    Layers that no reader takes have no cuts, like those of one expert, which have no router, and those whose gates
    cannot be shown.

    Raises:
        UserError: no ONNX model, or weights that are missing or cut.
    """
    path, layers, outputs = _save(model, out / WATCHED, None, _watch)
    return WatchedModel(path, tuple(layer for layer in layers if layer is not None), outputs)


def save_cut(model: Path, out: Path, layers: Collection[str]) -> CutModel:
    """Write ``model`` to directory ``out``, cut at those of ``layers`` that it has.

    Raises:
        UserError: no ONNX model, or weights that are missing or cut.
    """
    path, cut, outputs = _save(model, out / CUT, layers, _cut)
    return CutModel(path, tuple(layer for layer in cut if layer is not None), outputs)


def save_forced_routing(model: Path, out: Path) -> ForcedModel:
    """Write ``model`` to directory ``out`` with the routing of all layers as inputs.

    Raises:
        UserError: no ONNX model, weights that are missing or cut, or a layer whose routing cannot be an input.
    """
    path, layers, _ = _save(model, out / FORCED, None, _routed)
    return ForcedModel(path, layers)


def _save(
    model: Path, target: Path, layers: Collection[str] | None, change: Callable[[gs.Graph, Emitter, MoEBlock], L]
) -> tuple[Path, tuple[L, ...], tuple[str, ...]]:
    """``model`` after ``change`` of each block among ``layers``, its weights shared by link."""
    read = inspect_model(model)
    graph, names = read.graph, Names(read.graph)
    outputs = tuple(str(tensor.name) for tensor in graph.outputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    link_weights(graph, read.path.parent, target.parent)
    changed = tuple(
        change(graph, Emitter(graph, block.name, names).within("cut"), block)
        for block in read.blocks
        if layers is None or block.name in layers
    )
    sort_nodes(graph)
    save_variant(graph, target)
    save_for_cpu(target, target)
    return target, changed, outputs


def _watch(graph: gs.Graph, emitter: Emitter, block: MoEBlock) -> WatchedLayer | None:
    if not is_observable(block):
        return None
    return _shown(graph, emitter, block, _hidden(block))


def _shown(graph: gs.Graph, emitter: Emitter, block: MoEBlock, hidden: gs.Tensor) -> WatchedLayer:
    gates, scores = observe_routing(graph, emitter, block, routing_of(emitter, block))
    return WatchedLayer(
        name=block.name,
        keep=block.keep,
        top_k=block.router.top_k,
        hidden=_show(graph, emitter, hidden, "hidden", block.experts.up_EHF.shape[1]),
        out=_show(graph, emitter, block.out, "out", block.experts.down_EFH.shape[2]),
        gates=gates,
        scores=scores,
    )


def _cut(graph: gs.Graph, emitter: Emitter, block: MoEBlock) -> CutLayer | None:
    if not is_observable(block):
        return None
    hidden = _hidden(block)  # before what reads it reads something else
    forced = _force(graph, emitter, block)
    given_hidden = _give(graph, emitter, hidden, "hidden", block.experts.up_EHF.shape[1])
    given_out = _give(graph, emitter, block.out, "out", block.experts.down_EFH.shape[2])
    shown = _shown(graph, emitter, block, hidden)  # afterwards, so that it is what was computed
    return CutLayer(**vars(shown), given_hidden=given_hidden, given_out=given_out, forced=forced)


def _hidden(block: MoEBlock) -> gs.Tensor:
    """What the experts read, and the router in another shape or dtype perhaps."""
    return source(block.hidden)


def _routed(graph: gs.Graph, emitter: Emitter, block: MoEBlock) -> ForcedLayer:
    ids, weights = force_routing(graph, emitter, block)
    return ForcedLayer(block.name, block.keep, block.router.top_k, (ids, weights))


def _force(graph: gs.Graph, emitter: Emitter, block: MoEBlock) -> tuple[str, str] | None:
    try:
        ids, weights = force_routing(graph, emitter, block)
    except UserError:
        return None
    return ids, weights


def _show(graph: gs.Graph, emitter: Emitter, tensor: gs.Tensor, label: str, width: int) -> str:
    """A new output (T, ``width``) float32 with the values of ``tensor``; its name."""
    rows = emitter.reshape(tensor, (-1, width), f"{label}_rows")
    shown: gs.Variable = emitter.emit("Cast", rows, label=label, to=FLOAT)
    shown.dtype, shown.shape = np.dtype(np.float32), [None, None]
    graph.outputs.append(shown)
    return str(shown.name)


def _give(graph: gs.Graph, emitter: Emitter, tensor: gs.Tensor, label: str, width: int) -> str:
    """A new input (T, ``width``) float32 for whoever reads ``tensor``; its name."""
    emitter = emitter.within("given")
    given = gs.Variable(emitter.fresh(label), np.float32, [emitter.fresh(f"{label}_tokens"), width])
    read_instead(emitter, tensor, given, label)
    graph.inputs.append(given)
    return str(given.name)
