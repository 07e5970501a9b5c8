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
    flat = torch.reshape(b, routed.ids, [-1])
    sorted_ids, order = _argsort(b, flat)
    tokens = torch.index(b, block.hidden, 2, _floor_divide(b, order, spec.top_k))
    weights = torch.index(b, torch.reshape(b, routed.weights, [-1]), 1, order)
    runs = _runs(b, sorted_ids)
    projected = [_project(block, tokens, sorted_ids, runs, part) for part in block.matrices if part != "down_proj"]
    outputs = _project(block, ffn.middle(b, projected, rank=2), sorted_ids, runs, "down_proj")
    gated = b.op("Mul", torch.to_float(b, outputs) if spec.weights_float else outputs, b.op("Unsqueeze", weights, [-1]))
    by_slot = torch.index(b, gated, 2, _inverse(b, order, flat))
    by_token = torch.reshape(b, by_slot, [-1, spec.top_k, spec.hidden])
    return torch.half_total(b, by_token, 1, is_float=spec.weights_float)


def _argsort(b: Builder, flat: str) -> list[str]:
    """Ids in ascending order, and where each stood: a TopK of everything."""
    length = b.op("Gather", b.op("Shape", flat, start=0), np.asarray(-1), axis=0)
    count = b.op("Reshape", length, [1], allowzero=0)
    return b.ops("TopK", flat, count, out=("sorted_ids", "order"), axis=-1, largest=0, sorted=1)


def _floor_divide(b: Builder, order: str, top_k: int) -> str:
    """``order // top_k``, spelled out as torch.onnx does for numbers that may be negative."""
    k = np.asarray(top_k)
    negative = b.op("Equal", b.op("Less", order, np.asarray(0)), np.asarray(True), out="eq")
    remainder = b.op("Cast", b.op("Mod", order, k, fmod=0), to=TensorProto.BOOL)
    correction = b.op("Cast", b.op("And", negative, remainder), to=TensorProto.INT64)
    return b.op("Sub", b.op("Div", order, k), correction, out="floor_divide")


def _runs(b: Builder, sorted_ids: str) -> list[str]:
    """For each expert the rows that are its own: torch.histc, its running sum, and Ranges."""
    experts = b.spec.experts
    bins = torch.reshape(b, b.op("Cast", sorted_ids, out="_to_copy", to=TensorProto.FLOAT), [-1])
    width = np.float32((experts - 1) / experts) if experts > 1 else np.float32(1)
    index = b.op("Cast", b.op("Div", bins, np.asarray(width)), out="_to_copy", to=TensorProto.INT64)
    clamped = b.op("Clip", index, np.asarray(0), np.asarray(experts - 1), out="clamp")
    ones = b.op("Expand", b.scalar(1), b.op("Shape", clamped, start=0), out="ones_like")
    zeros = np.zeros(experts, np.float32)
    counts = b.op("ScatterElements", zeros, clamped, ones, out="scatter_add", axis=0, reduction="add")
    ends = b.op("CumSum", b.op("Cast", counts, to=TensorProto.INT32), np.asarray(0), reverse=0, exclusive=0)
    starts = [b.constant(np.asarray(0))]
    starts += [b.op("Squeeze", end, [0]) for end in _split(b, b.op("Cast", ends, to=TensorProto.INT64))]
    return [b.op("Range", *pair, np.asarray(1)) for pair in itertools.pairwise(starts)]


def _split(b: Builder, x: str) -> list[str]:
    """``x`` along its first axis, one piece an expert."""
    return [x] if b.spec.experts == 1 else torch.split(b, x, 0, b.spec.experts)


def _project(block: Block, x: str, sorted_ids: str, runs: list[str], part: str) -> str:
    b = block.b
    stored = parameters.stacked(block, part, transposed=True)
    products = [
        b.op("MatMul", b.op("Gather", x, rows, axis=0), b.op("Squeeze", piece, [0]))
        for rows, piece in zip(runs, _split(b, stored), strict=True)
    ]
    result = b.op("Concat", *products, out="grouped_mm_fallback", axis=0)
    if not block.vectors:
        return result
    return b.op("Add", result, torch.index(b, parameters.stacked_bias(block, part), 2, sorted_ids))


def _inverse(b: Builder, order: str, flat: str) -> str:
    """Where each slot went when they were sorted."""
    empty = b.op("Expand", np.asarray(0), b.op("Shape", order, start=0), out="empty_like")
    count = b.op("Squeeze", b.op("Shape", flat, start=0, end=1))
    places = b.op("Range", np.asarray(0), count, np.asarray(1), out="arange")
    return b.op("ScatterND", empty, b.op("Unsqueeze", order, [-1]), places)
