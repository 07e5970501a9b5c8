"""(T, E) gates, 0 where an expert is not selected, in the ways in which dense forms make them."""

from collections.abc import Callable, Mapping

import numpy as np
from onnx import TensorProto, helper

from tests.graph_passes.block_models import routers
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import ELEMENT_TYPES
from tests.graph_passes.block_models.routers import Slots


def gates(block: Block) -> str:
    """(T, E) in the model's type unless ``weights_float``."""
    if block.spec.gates in FROM_SLOTS:
        return FROM_SLOTS[block.spec.gates](block, routers.slots(block))
    made = FROM_SCORES[block.spec.gates](block)
    return made if block.spec.weights_float else torch.to_model(block.b, made)


def weights_type(block: Block) -> int:
    """Element type of what the router hands over."""
    return TensorProto.FLOAT if block.spec.weights_float else ELEMENT_TYPES[block.spec.dtype]


def _scatter(block: Block, slots: Slots) -> str:
    zeros = torch.zeros_like(block.b, slots.logits, weights_type(block))
    return block.b.op("ScatterElements", zeros, slots.ids, slots.weights, out="scatter", axis=1, reduction="none")


def _equal(block: Block, slots: Slots) -> str:
    b = block.b
    hot = b.op("Cast", torch.one_hot(b, slots.ids, block.spec.experts), out="_to_copy", to=weights_type(block))
    return torch.total(b, b.op("Mul", hot, b.op("Unsqueeze", slots.weights, [-1])), 1)


def _onehot(block: Block, slots: Slots) -> str:
    b = block.b
    values = np.stack([b.scalar(0, weights_type(block)), b.scalar(1, weights_type(block))])
    hot = b.op("OneHot", slots.ids, np.asarray(block.spec.experts), values, axis=-1)
    return torch.total(b, b.op("Mul", hot, b.op("Unsqueeze", slots.weights, [-1])), 1)


def _where(block: Block, slots: Slots) -> str:
    b = block.b
    hit = b.op("Equal", b.op("Unsqueeze", slots.ids, [-1]), torch.arange(b, block.spec.experts), out="eq")
    kept = b.op("Where", hit, b.op("Unsqueeze", slots.weights, [-1]), b.scalar(0, weights_type(block)))
    return torch.total(b, kept, 1)


def _mask(block: Block) -> str:
    """The scores times a mask of the K best."""
    b = block.b
    scored = routers.scores(block, routers.logits(block))
    ids, _ = routers.select(block, scored)
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1])
    ones = b.op("ConstantOfShape", b.op("Shape", ids, start=0), value=one)
    zeros = torch.zeros_like(b, scored, TensorProto.FLOAT)
    mask = b.op("ScatterElements", zeros, ids, ones, out="scatter", axis=1, reduction="none")
    return routers.scaled(block, routers.renormalized(block, b.op("Mul", scored, mask)))


def _minus_inf(block: Block) -> str:
    """The K best logits scattered into -inf, then scored: Llama 4, and Shazeer's KeepTopK."""
    b = block.b
    routed = routers.logits(block)
    values, ids = routers.best(b, routed, block.spec.top_k)
    empty = b.op("Expand", b.scalar(-np.inf), b.op("Shape", routed, start=0), out="full_like")
    kept = b.op("ScatterElements", empty, ids, values, out="scatter", axis=1, reduction="none")
    return routers.scaled(block, routers.scores(block, kept))


FROM_SLOTS: Mapping[str, Callable[[Block, Slots], str]] = {
    "scatter": _scatter,
    "equal": _equal,
    "onehot": _onehot,
    "where": _where,
}
FROM_SCORES: Mapping[str, Callable[[Block], str]] = {"mask": _mask, "minus_inf": _minus_inf}
