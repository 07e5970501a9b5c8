"""Each expert on its own tokens: NonZero finds them, they are gathered, and what they give is scattered back."""

import numpy as np
from onnx import TensorProto

from tests.graph_passes.block_models import ffn, routers
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import Builder
from tests.graph_passes.block_models.gates import gates


def emit(block: Block) -> str:
    """``for e: out.index_add_(0, tokens_e, experts[e](hidden[tokens_e]) * weights[tokens_e, slots_e])``."""
    spec, b = block.spec, block.b
    found = _found_in_gates(block) if spec.hit == "gates" else _found_in_slots(block)
    summed = torch.zeros_like(b, block.hidden, b.element_type)
    for expert, (tokens, weights) in enumerate(found):
        rows = _at(block, block.hidden, 2, tokens)
        gated = _gated(block, expert, rows, b.op("Unsqueeze", weights, [-1]))
        summed = SCATTERS[spec.scatter](block, summed, tokens, gated)
    return summed


def _gated(block: Block, expert: int, rows: str, weights: str) -> str:
    spec, b = block.spec, block.b
    if spec.weights_on == "input":
        return ffn.one_expert(block, b.op("Mul", rows, weights), expert)
    outputs = ffn.one_expert(block, rows, expert)
    if not spec.weights_float:
        return b.op("Mul", outputs, weights)
    return torch.to_model(b, b.op("Mul", torch.to_float(b, outputs), weights))


def _found_in_slots(block: Block) -> list[tuple[str, str]]:
    """For each expert its tokens (n,) and their weights (n,)."""
    b = block.b
    routed = routers.slots(block)
    found = []
    for hit in _hits(block, routed.ids):
        rows = _nonzero(b, hit, rank=2)
        slots, tokens = rows if block.spec.hit == "one_hot" else reversed(rows)
        found.append((tokens, _at(block, routed.weights, 2, tokens, slots)))
    return found


def _found_in_gates(block: Block) -> list[tuple[str, str]]:
    """The same where the gates (T, E) are not 0."""
    b = block.b
    gates_TE = gates(block)
    found = []
    for expert in range(block.spec.experts):
        column = torch.select(b, gates_TE, 1, expert)
        (tokens,) = _nonzero(b, b.op("Cast", column, to=TensorProto.BOOL), rank=1)
        found.append((tokens, _at(block, column, 1, tokens)))
    return found


def _hits(block: Block, ids: str) -> list[str]:
    """For each expert where it was selected: (T, K) bool, or (K, T) int64 out of the one-hot of all."""
    spec, b = block.spec, block.b
    if spec.hit == "equal":
        return [b.op("Equal", ids, np.asarray(expert), out="eq") for expert in range(spec.experts)]
    mask = b.op("Transpose", torch.one_hot(b, ids, spec.experts), out="permute", perm=[2, 1, 0])
    return [torch.select(b, mask, 0, expert) for expert in range(spec.experts)]


def _nonzero(b: Builder, hit: str, rank: int) -> list[str]:
    """Indices (n,) of what is not zero, one for each axis."""
    found = b.op("NonZero", hit)
    if b.spec.scatter == "ScatterND":
        return [b.op("Gather", found, np.asarray(axis), axis=0) for axis in range(rank)]
    turned = b.op("Transpose", found, out="nonzero", perm=[1, 0])
    return [b.op("Squeeze", b.op("Slice", turned, [axis], [axis + 1], [1]), [1]) for axis in range(rank)]


def _at(block: Block, value: str, rank: int, *indices: str) -> str:
    """``value[indices]``."""
    if block.spec.scatter == "ScatterND" and len(indices) == 1:
        return block.b.op("Gather", value, *indices, axis=0)
    return torch.index(block.b, value, rank, *indices)


def _scatter_nd(block: Block, summed: str, tokens: str, gated: str) -> str:
    return block.b.op("ScatterND", summed, block.b.op("Unsqueeze", tokens, [-1]), gated, reduction="add")


def _index_put(block: Block, summed: str, tokens: str, gated: str) -> str:
    return torch.index_put(block.b, summed, 2, tokens, gated, reduction="add")


def _scatter_elements(block: Block, summed: str, tokens: str, gated: str) -> str:
    wide = block.b.op("Expand", block.b.op("Unsqueeze", tokens, [-1]), [1, block.spec.hidden])
    return block.b.op("ScatterElements", summed, wide, gated, out="scatter_add", axis=0, reduction="add")


def _assign(block: Block, summed: str, tokens: str, gated: str) -> str:
    """``out[tokens] = out[tokens] + gated``, right because a token meets an expert once."""
    b = block.b
    added = b.op("Add", torch.index(b, summed, 2, tokens), gated)
    return torch.index_put(b, summed, 2, tokens, added)


SCATTERS = {
    "ScatterND": _scatter_nd,
    "index_put": _index_put,
    "ScatterElements": _scatter_elements,
    "assign": _assign,
}
