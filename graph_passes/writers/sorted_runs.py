"""Form ``sorted``: tokens sorted by expert, one small FFN an expert on its own tokens, results put back in order.

Only the selected work is done, so this is the form for many experts and many tokens on a CPU. Its Split sizes depend on
data. Slots whose row of the router leads to no expert are sorted behind all others, and nothing is computed of them:
their weight is 0.
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import INT64, Emitter
from graph_passes.record.block import ON_INPUT, ON_OUTPUT, Experts, MoEBlock
from graph_passes.writers.expert_math import gate_dtype, single_ffn
from graph_passes.writers.routing import Routing, emit_routing, slots_of


@dataclasses.dataclass(frozen=True)
class Computed:
    """A block in this form, and what is computed on the way.

    Attributes:
        out: (T, H).
        ids: (T, K) int64.
        weights: (T, K) float32, 0 where an expert had no place for the token.
        outputs: (T K, H) what the experts give, the slots of one behind those of the other, before ``weights``.
        places: (T K,) where in that order each slot is.
    """

    out: gs.Tensor
    ids: gs.Tensor
    weights: gs.Tensor
    outputs: gs.Tensor
    places: gs.Tensor


def write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, Routing]:
    """Nodes that compute ``block.out``, and the routing they use."""
    routing = emit_routing(emitter, block)
    return compute(emitter, block, routing).out, routing


def compute(emitter: Emitter, block: MoEBlock, routing: Routing) -> Computed:
    """Nodes for the experts of ``block`` behind ``routing``."""
    experts, count, top_k = block.experts, block.num_experts, block.router.slot_count
    ids, weights = slots_of(emitter, routing, block, nobody=count)
    runs = count if routing.leads_to is None else count + 1
    flat = emitter.reshape(ids, (-1,), "slots")
    slots = emitter.emit("Shape", flat, label="slot_count")
    order = _argsort(emitter, flat, slots, "order")
    token = emitter.emit("Div", order, emitter.array("top_k", np.int64(top_k)), label="token")
    tokens = emitter.emit("Gather", block.hidden, token, label="sorted_tokens", axis=0)
    gates = gate_dtype(emitter, emitter.reshape(weights, (-1, 1), "weights_column"), experts)
    sorted_gates = emitter.emit("Gather", gates, order, label="sorted_gates", axis=0)
    if block.weights_on == ON_INPUT:
        tokens = emitter.emit("Mul", tokens, sorted_gates, label="gated_tokens")
    gated = outputs = _each(emitter, tokens, _counts(emitter, flat, runs), runs, experts)
    if block.weights_on == ON_OUTPUT:
        gated = emitter.emit("Mul", outputs, sorted_gates, label="gated")
    places = _argsort(emitter, order, slots, "inverse")
    back = emitter.emit("Gather", gated, places, label="unsorted", axis=0)
    by_token = emitter.reshape(back, (-1, top_k, experts.down_EFH.shape[2]), "by_token")
    out = emitter.emit("ReduceSum", by_token, emitter.ints(1), label="out", keepdims=0)
    return Computed(out, ids, weights, outputs, places)


def _argsort(emitter: Emitter, values: gs.Tensor, count: gs.Tensor, label: str) -> gs.Tensor:
    """Indices that sort ``values`` ascending; of a permutation, its inverse."""
    _, indices = emitter.emit("TopK", values, count, label=label, outputs=2, axis=0, largest=0, sorted=1)
    return indices


def _counts(emitter: Emitter, ids: gs.Tensor, runs: int) -> gs.Tensor:
    """(runs,) how many slots chose each expert, and none."""
    column = emitter.emit("Unsqueeze", ids, emitter.ints(1), label="slots_column")
    hit = emitter.emit("Equal", column, emitter.array("expert_ids", np.arange(runs)), label="slot_hit")
    number = emitter.emit("Cast", hit, label="slot_hit_number", to=INT64)
    return emitter.emit("ReduceSum", number, emitter.ints(0), label="counts", keepdims=0)


def _each(emitter: Emitter, tokens: gs.Tensor, counts: gs.Tensor, runs: int, experts: Experts) -> gs.Tensor:
    """Each expert's FFN on its own run of ``tokens``, concatenated; a run of no expert is passed on as it is."""
    number = experts.up_EHF.shape[0]
    parts = emitter.emit("Split", tokens, counts, label="run", outputs=runs, axis=0)
    split = parts if isinstance(parts, list) else [parts]
    ffns = [
        single_ffn(emitter, run, experts, expert, f"experts.{expert}", f"_{expert}")
        for expert, run in enumerate(split[:number])
    ]
    return emitter.emit("Concat", *ffns, *split[number:], label="outputs", axis=0)
