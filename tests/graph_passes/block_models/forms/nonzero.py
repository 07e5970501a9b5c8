"""Each expert on its own tokens: NonZero finds them, they are gathered, and what they give is scattered back."""

import numpy as np

from tests.graph_passes.block_models import ffn, routers
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import Builder


def emit(block: Block) -> str:
    """``for e: out.index_add_(0, tokens_e, experts[e](hidden[tokens_e]) * weights[tokens_e, slots_e])``."""
    spec, b = block.spec, block.b
    routed = routers.slots(block)
    hits = _hits(block, routed.ids)
    summed = torch.zeros_like(b, block.hidden, b.element_type)
    for expert, hit in enumerate(hits):
        tokens, slots = _where(b, hit, flipped=spec.hit == "one_hot")
        weights = b.op("Unsqueeze", _at(block, routed.weights, tokens, slots), [-1])
        rows = _at(block, block.hidden, tokens)
        summed = SCATTERS[spec.scatter](block, summed, tokens, _gated(block, expert, rows, weights))
    return summed


def _gated(block: Block, expert: int, rows: str, weights: str) -> str:
    spec, b = block.spec, block.b
    if spec.weights_on == "input":
        return ffn.one_expert(block, b.op("Mul", rows, weights), expert)
    outputs = ffn.one_expert(block, rows, expert)
    if not spec.weights_float:
        return b.op("Mul", outputs, weights)
    return torch.to_model(b, b.op("Mul", torch.to_float(b, outputs), weights))


def _hits(block: Block, ids: str) -> list[str]:
    """For each expert where it was selected: (T, K) bool, or (K, T) int64 out of the one-hot of all."""
    spec, b = block.spec, block.b
    if spec.hit == "equal":
        return [b.op("Equal", ids, np.asarray(expert), out="eq") for expert in range(spec.experts)]
    mask = b.op("Transpose", torch.one_hot(b, ids, spec.experts), out="permute", perm=[2, 1, 0])
    return [torch.select(b, mask, 0, expert) for expert in range(spec.experts)]


def _where(b: Builder, hit: str, *, flipped: bool) -> tuple[str, str]:
    """Tokens (n,) and slots (n,) of what is not zero."""
    found = b.op("NonZero", hit)
    if b.spec.scatter == "ScatterND":
        rows = [b.op("Gather", found, np.asarray(row), axis=0) for row in (0, 1)]
    else:
        turned = b.op("Transpose", found, out="nonzero", perm=[1, 0])
        rows = [b.op("Squeeze", torch.columns(b, turned, row, row + 1), [1]) for row in (0, 1)]
    return (rows[1], rows[0]) if flipped else (rows[0], rows[1])


def _at(block: Block, value: str, tokens: str, slots: str | None = None) -> str:
    """``value[tokens]`` or ``value[tokens, slots]``."""
    b = block.b
    if block.spec.scatter == "ScatterND" and slots is None:
        return b.op("Gather", value, tokens, axis=0)
    return torch.index(b, value, 2, tokens, *([] if slots is None else [slots]))


def _scatter_nd(block: Block, summed: str, tokens: str, gated: str) -> str:
    return block.b.op("ScatterND", summed, block.b.op("Unsqueeze", tokens, [-1]), gated, reduction="add")


def _scatter_elements(block: Block, summed: str, tokens: str, gated: str) -> str:
    wide = block.b.op("Expand", block.b.op("Unsqueeze", tokens, [-1]), [1, block.spec.hidden])
    return block.b.op("ScatterElements", summed, wide, gated, out="scatter_add", axis=0, reduction="add")


def _assign(block: Block, summed: str, tokens: str, gated: str) -> str:
    """``out[tokens] = out[tokens] + gated``, right because a token meets an expert once."""
    b = block.b
    added = b.op("Add", torch.index(b, summed, 2, tokens), gated)
    return b.op("ScatterND", summed, b.op("Unsqueeze", tokens, [-1]), added)


SCATTERS = {
    "ScatterND": _scatter_nd,
    "index_put": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "assign": _assign,
}
