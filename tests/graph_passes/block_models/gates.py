"""(T, E) gates, 0 where an expert is not selected, in the ways in which dense forms make them."""

from collections.abc import Callable, Mapping

import numpy as np
from onnx import TensorProto

from tests.graph_passes.block_models import routers
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import ELEMENT_TYPES
from tests.graph_passes.block_models.routers import argmax, topk
from tests.graph_passes.block_models.routers.scoring import Slots


def gates(block: Block) -> str:
    """(T, E) in the model's type unless ``weights_float``."""
    spec = block.spec
    if spec.gates in FROM_SLOTS:
        return FROM_SLOTS[spec.gates](block, routers.slots(block))
    made = FROM_SCORES[spec.selection, spec.gates](block)
    return made if spec.weights_float else torch.to_model(block.b, made)


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


FROM_SLOTS: Mapping[str, Callable[[Block, Slots], str]] = {
    "scatter": _scatter,
    "equal": _equal,
    "onehot": _onehot,
    "where": _where,
}
FROM_SCORES: Mapping[tuple[str, str], Callable[[Block], str]] = {
    ("topk", "mask"): topk.masked,
    ("topk", "minus_inf"): topk.in_minus_inf,
    ("argmax", "mask"): argmax.gates_of_one,
    ("two_argmax", "mask"): argmax.gates_of_two,
}
