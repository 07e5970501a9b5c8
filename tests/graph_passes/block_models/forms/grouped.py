"""transformers' ``grouped_mm`` as its exporter unrolls it: tokens sorted by expert, one MatMul for each expert."""

import itertools

import numpy as np
from onnx import TensorProto

from tests.graph_passes.block_models import ffn, parameters, routers
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import Builder


def emit(block: Block) -> str:
    spec, b = block.spec, block.b
    routed = routers.slots(block)
    slots = _count_slots(block)
    flat = torch.reshape(b, routed.ids, [-1])
    sorted_ids, order = _argsort(b, flat)
    tokens = torch.index(b, block.hidden, 2, _floor_divide(b, order, spec.top_k))
    weights = torch.index(b, torch.reshape(b, routed.weights, [-1]), 1, order)
    ends = _ends(block, sorted_ids)
    projected = [_project(block, tokens, sorted_ids, ends, part) for part in block.matrices if part != "down_proj"]
    outputs = _project(block, ffn.middle(b, projected, rank=2), sorted_ids, ends, "down_proj")
    gated = b.op("Mul", torch.to_float(b, outputs) if spec.weights_float else outputs, b.op("Unsqueeze", weights, [-1]))
    by_slot = torch.index(b, gated, 2, _inverse(b, order, slots))
    by_token = torch.reshape(b, by_slot, [-1, spec.top_k, spec.hidden])
    return torch.half_total(b, by_token, 1, is_float=spec.weights_float)


def _count_slots(block: Block) -> str:
    """T times K, as a number."""
    b, count = block.b, block.b.constant(np.asarray(block.spec.top_k))
    for axis in reversed(range(block.spec.rank - 1)):
        count = b.op("Mul", count, b.op("Squeeze", b.op("Shape", block.x, start=axis, end=axis + 1)))
    return count


def _argsort(b: Builder, flat: str) -> list[str]:
    """Ids in ascending order, and where each stood: a TopK of everything."""
    length = b.op("Gather", b.op("Shape", flat, start=0), np.asarray(-1), axis=0)
    count = b.op("Reshape", length, [1], allowzero=0)
    return b.ops("TopK", flat, count, out=("sorted_ids", "order"), axis=-1, largest=0, sorted=1)


def _floor_divide(b: Builder, order: str, top_k: int) -> str:
    """``order // top_k``, spelled out as torch.onnx does for numbers that may be negative."""
    k = np.asarray(top_k)
    positive = b.op("Greater", k, np.asarray(0)) if b.spec.unoptimised else np.asarray(True)
    negative = b.op("Equal", b.op("Less", order, np.asarray(0)), positive, out="eq")
    remainder = b.op("Cast", b.op("Mod", order, k, fmod=0), to=TensorProto.BOOL)
    correction = b.op("Cast", b.op("And", negative, remainder), to=TensorProto.INT64)
    return b.op("Sub", b.op("Div", order, k), correction, out="floor_divide")


def _ends(block: Block, sorted_ids: str) -> str:
    """(E,) where the rows of each expert end: torch.histc and its running sum."""
    b, experts = block.b, block.spec.experts
    bins = torch.reshape(b, b.op("Cast", sorted_ids, out="_to_copy", to=TensorProto.FLOAT), [-1])
    index = b.op("Cast", _in_bins(block, bins), out="_to_copy", to=TensorProto.INT64)
    limits = (torch.number(b, limit, index, TensorProto.INT64) for limit in (0, experts - 1))
    clamped = b.op("Clip", index, *limits, out="clamp")
    ones = b.op("Expand", b.scalar(1), b.op("Shape", clamped, start=0), out="ones_like")
    zeros = b.op("Expand", b.scalar(0), [experts]) if b.spec.unoptimised else np.zeros(experts, np.float32)
    counts = b.op("ScatterElements", zeros, clamped, ones, out="scatter_add", axis=0, reduction="add")
    return b.op("CumSum", b.op("Cast", counts, to=TensorProto.INT32), np.asarray(0), reverse=0, exclusive=0)


def _in_bins(block: Block, ids: str) -> str:
    """Ids from 0 to E - 1 divided by the width of E bins between them."""
    b, last = block.b, block.spec.experts - 1
    if not b.spec.unoptimised:
        return b.op("Div", ids, np.asarray(np.float32(last / block.spec.experts if last else 1)))
    names = (block.parameter(f"lifted_tensor_{number}") for number in (2, 3))
    limits = [np.asarray(limit, np.float32) for limit in (0, last or 1)]
    low, high = (b.op("Identity", b.weight(name, limit)) for name, limit in zip(names, limits, strict=True))
    bins = b.op("Cast", np.asarray(block.spec.experts), to=TensorProto.FLOAT)
    return b.op("Div", b.op("Sub", ids, low), b.op("Div", b.op("Sub", high, low), bins))


def _runs(b: Builder, ends: str) -> list[str]:
    """For each expert the rows that are its own."""
    after = _split(b, b.op("Cast", ends, to=TensorProto.INT64))
    if b.spec.unoptimised:
        before = [b.constant([0]), *after[:-1]]
        pairs = [[b.op("Squeeze", end, [0]) for end in pair] for pair in zip(before, after, strict=True)]
    else:
        numbers = [b.constant(np.asarray(0)), *(b.op("Squeeze", end, [0]) for end in after)]
        pairs = [list(pair) for pair in itertools.pairwise(numbers)]
    return [b.op("Range", *pair, np.asarray(1)) for pair in pairs]


def _split(b: Builder, x: str) -> list[str]:
    """``x`` along its first axis, one piece an expert."""
    return [x] if b.spec.experts == 1 else torch.split(b, x, 0, b.spec.experts)


def _project(block: Block, x: str, sorted_ids: str, ends: str, part: str) -> str:
    b = block.b
    runs = _runs(b, ends)
    stored = parameters.stacked(block, part, transposed=True)
    products = [
        b.op("MatMul", b.op("Gather", x, rows, axis=0), b.op("Squeeze", piece, [0]))
        for rows, piece in zip(runs, _split(b, stored), strict=True)
    ]
    result = b.op("Concat", *products, out="grouped_mm_fallback", axis=0)
    if not block.vectors:
        return result
    return b.op("Add", result, torch.index(b, parameters.stacked_bias(block, part), 2, sorted_ids))


def _inverse(b: Builder, order: str, slots: str) -> str:
    """Where each slot went when they were sorted."""
    empty = b.op("Expand", torch.number(b, 0, order, TensorProto.INT64), b.op("Shape", order, start=0))
    start, step = (torch.number(b, limit, slots, TensorProto.INT64) for limit in (0, 1))
    return torch.index_put(b, empty, 1, order, b.op("Range", start, slots, step, out="arange"))
