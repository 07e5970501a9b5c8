"""A variant of a model that tells what its experts do: logits, ids, weights and norms of every layer as extra outputs.

experts.onnx has four more outputs for each MoE layer::

    <layer>/observed/logits (T, E) float32    of the router, biases included, before anything is scored or chosen
    <layer>/observed/ids (T, K) int64         which experts, 0 to E - 1; all of them in order where nothing is ranked
    <layer>/observed/weights (T, K) float32   as the experts use them: 0 where a capacity dropped the slot
    <layer>/observed/norms (T, K) float32     L2 norm of what the expert gives, before its weight multiplies that

The graphs of most forms have no such values, so the layers are written anew in form ``sorted``. Weight times norm is
what REAP (https://arxiv.org/abs/2510.13999) averages over the tokens of an expert. Where the weights multiply the
experts' inputs, the norms are of what the experts make of those.
"""

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import FLOAT, Emitter, Names
from graph_passes.graph.order import tidy
from graph_passes.graph.walk import replace_uses
from graph_passes.model_file import load_graph, save_rewritten_variant
from graph_passes.readers import read_blocks
from graph_passes.record.block import MoEBlock
from graph_passes.rewrite import check_opset, on_tokens
from graph_passes.writers import why_not
from graph_passes.writers.routing import emit_logits, routing_on
from graph_passes.writers.sorted_runs import Computed, compute
from moe_spec.errors import UserError
from moe_spec.manifest import MODEL

EXPERTS = "experts.onnx"
FORM = "sorted"

REDUCE_AXES_SINCE = 18
"""The opset from which ReduceL2 takes its axes as an input."""


def save_experts_observed(directory: Path, *, check: bool = True) -> dict[str, list[str]]:
    """Write ``directory/experts.onnx`` beside model.onnx; for each MoE layer its logits, ids, weights and norms.

    It shares the weights of model.onnx as far as they lie there expert by expert; experts.onnx.data has the others.
    ``check`` asks onnx.checker about it, which takes no weights that are hard links.

    Raises:
        UserError: a layer cannot be written in form ``sorted`` in the model's opset.
    """
    graph = load_graph(directory / MODEL)
    blocks, names, outputs = read_blocks(graph, directory).blocks, Names(graph), {}
    if blocks:
        check_opset(graph)
    for block in reversed(blocks):  # a block may read what another one writes
        outputs[block.name] = observe_experts(graph, Emitter(graph, block.name, names), block)
    tidy(graph)
    save_rewritten_variant(graph, directory / EXPERTS, check=check)
    return {block.name: outputs[block.name] for block in blocks}


def observe_experts(graph: gs.Graph, emitter: Emitter, block: MoEBlock) -> list[str]:
    """Write ``block`` anew, and add its four outputs to ``graph``; their names.

    Raises:
        UserError: form ``sorted`` cannot express it.
    """
    reason = why_not(block, FORM)
    if block.router.leads_to is not None:  # of whom nobody could say what they would have given
        reason = "some rows of its router lead to no expert of their own"
    if reason is not None:
        raise UserError(
            f"the experts of layer {block.name} cannot be observed: {reason}",
            hint="leave --observe-experts out; observed.onnx has gates and scores of the other layers",
        )
    out, observed = on_tokens(emitter, block, _write)
    replace_uses(graph, block.out, out)
    for tensor in observed:
        graph.outputs.append(tensor)
    return [str(tensor.name) for tensor in observed]


def _write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, list[gs.Variable]]:
    """The layer's output, and the values that are observed."""
    logits = emit_logits(emitter, block)
    computed = compute(emitter, block, routing_on(emitter, block.router, logits))
    observed = emitter.within("observed")
    norms = _norms(observed, computed, block.router.top_k)
    return computed.out, [
        _named(observed, logits, "logits", np.float32),
        _named(observed, computed.ids, "ids", np.int64),
        _named(observed, computed.weights, "weights", np.float32),
        _named(observed, norms, "norms", np.float32),
    ]


def _norms(emitter: Emitter, computed: Computed, top_k: int) -> gs.Tensor:
    """(T, K) float32; the squares of float16 outputs would overflow."""
    outputs = emitter.emit("Cast", computed.outputs, label="outputs_float", to=FLOAT)
    if emitter.opset < REDUCE_AXES_SINCE:
        of_runs = emitter.emit("ReduceL2", outputs, label="norms_of_runs", axes=[1], keepdims=0)
    else:
        of_runs = emitter.emit("ReduceL2", outputs, emitter.ints(1), label="norms_of_runs", keepdims=0)
    by_slot = emitter.emit("Gather", of_runs, computed.places, label="norms_of_slots", axis=0)
    return emitter.reshape(by_slot, (-1, top_k), "norms_by_token")


def _named(emitter: Emitter, tensor: gs.Tensor, label: str, dtype: type[np.generic]) -> gs.Variable:
    result: gs.Variable = emitter.emit("Identity", tensor, label=label)
    result.dtype, result.shape = np.dtype(dtype), [None, None]
    return result
