"""Phi-3.5-MoE's router: twice the largest logit, each weighed by a softmax over those near it. No TopK.

SparseMixer, https://huggingface.co/papers/2409.12136.
"""

import numpy as np
from onnx import TensorProto, helper

from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.routers.scoring import Slots, logits, scaled


def slots(block: Block) -> Slots:
    """The best, and the best without it."""
    b = block.b
    routed = logits(block)
    first, weight = _largest(block, routed, routed)
    lowest = helper.make_tensor("lowest", TensorProto.FLOAT, [1], [-np.inf])
    holes = b.op("ConstantOfShape", b.op("Shape", first, start=0), value=lowest)
    others = b.op("ScatterElements", routed, first, holes, out="scatter", axis=-1, reduction="none")
    second, second_weight = _largest(block, others, routed)
    weights = b.op("Concat", weight, second_weight, axis=-1)
    return Slots(b.op("Concat", first, second, out="ids", axis=-1), scaled(block, weights), routed)


def _largest(block: Block, candidates: str, routed: str) -> tuple[str, str]:
    """Id and weight (T, 1) of the largest candidate; logits further below it than the jitter weigh nothing."""
    b = block.b
    largest = torch.reduce_max(b, candidates, keepdims=1)
    at = b.op("ArgMax", candidates, out="argmax", axis=-1, keepdims=1, select_last_index=0)
    size = b.op("Abs", routed)
    factor = b.op("Max", size, b.op("CastLike", largest, size) if b.spec.unoptimised else largest, out="clamp")
    below = b.op("Div", b.op("Sub", largest, routed), factor)
    far = b.op("Greater", below, b.scalar(2 * block.spec.jitter_eps), out="gt")
    near = b.op("Where", far, torch.number(b, -np.inf, candidates), candidates, out="masked_fill")
    weight = b.op("GatherElements", b.op("Softmax", near, axis=-1), at, out="gather", axis=-1)
    return at, weight
