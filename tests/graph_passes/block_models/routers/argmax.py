"""Routers that take the largest, or the largest twice, as one-hot masks: Switch and NLLB-MoE. No TopK."""

from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import Builder
from tests.graph_passes.block_models.routers.scoring import Slots, above_eps, logits, scaled, scores


def slots_of_one(block: Block) -> Slots:
    """The largest and its score."""
    b = block.b
    routed = logits(block)
    scored = scores(block, routed)
    ids = b.op("ArgMax", scored, out="ids", axis=-1, keepdims=1, select_last_index=0)
    return Slots(ids, scaled(block, torch.reduce_max(b, scored, keepdims=1)), routed)


def gates_of_one(block: Block) -> str:
    """(T, E): Switch's score of the largest times its one-hot mask, which drops what is beyond the capacity."""
    spec, b = block.spec, block.b
    scored = scores(block, logits(block, by_sequence=True))
    mask = torch.one_hot(b, _largest(b, scored), spec.experts)
    if spec.capacity is not None:
        priority = b.op("CumSum", mask, np.asarray(-2), exclusive=0, reverse=0)
        within = b.op("LessOrEqual", priority, np.asarray(spec.capacity), out="le")
        mask = b.op("Mul", mask, b.op("Cast", within, to=TensorProto.INT64))
    probability = b.op("Unsqueeze", torch.reduce_max(b, scored, keepdims=0), [-1])
    gates = b.op("Mul", b.op("Cast", mask, to=TensorProto.FLOAT), scaled(block, probability))
    return gates if spec.rank == 2 else torch.reshape(b, gates, [-1, spec.experts])


def slots_of_two(block: Block) -> Slots:
    """Both choices side by side; those beyond the capacity weigh 0."""
    two = _choose_two(block)
    ids, weights = (_side_by_side(block.b, values) for values in (two.ids, two.weights))
    return Slots(ids, scaled(block, weights), two.logits)


def gates_of_two(block: Block) -> str:
    """(T, E): the sum of both masks times their weights."""
    b = block.b
    two = _choose_two(block)
    parts = [
        b.op("Mul", b.op("Unsqueeze", weight, [1]), mask) for weight, mask in zip(two.weights, two.masks, strict=True)
    ]
    return scaled(block, b.op("Add", *parts))


class _Two(NamedTuple):
    """Logits (T, E); of the first and second choice ids (T,), weights (T,) and float masks (T, E) after dropping."""

    logits: str
    ids: list[str]
    weights: list[str]
    masks: list[str]


def _choose_two(block: Block) -> _Two:
    b = block.b
    routed = logits(block)
    scored = scores(block, routed)
    first = _largest(b, scored)
    mask = torch.one_hot(b, first, b.spec.experts)
    taken, lowest = b.op("Cast", mask, to=TensorProto.BOOL), torch.number(b, -np.inf, routed)
    others = b.op("Where", taken, lowest, routed, out="masked_fill")
    second = _largest(b, others)
    masks = [mask, torch.one_hot(b, second, b.spec.experts)]
    if block.spec.capacity is not None:
        masks = _within_capacity(block, masks)
    masks = [b.op("Cast", mask, to=TensorProto.FLOAT) for mask in masks]
    weights = [torch.total(b, b.op("Mul", scored, mask), 1) for mask in masks]
    if block.spec.renormalize:
        summed = above_eps(block, b.op("Add", *weights))
        weights = [b.op("Div", weight, summed, out="normalized") for weight in weights]
    return _Two(routed, [first, second], weights, masks)


def _side_by_side(b: Builder, values: list[str]) -> str:
    """(T, 2) of two values (T,)."""
    return b.op("Concat", *(b.op("Unsqueeze", value, [1]) for value in values), axis=1)


def _largest(b: Builder, values: str) -> str:
    """Where the last axis is largest, without that axis."""
    return b.op("ArgMax", values, axis=-1, keepdims=0, select_last_index=0)


def _within_capacity(block: Block, masks: list[str]) -> list[str]:
    """All first choices take their places before any second choice."""
    b = block.b
    runs = [b.op("CumSum", mask, np.asarray(0), exclusive=0, reverse=0) for mask in masks]
    first, second = (b.op("Sub", running, np.asarray(1)) for running in runs)
    second = b.op("Add", second, torch.total(b, masks[0], 0, keepdims=1))
    within = [b.op("Less", place, np.asarray(block.spec.capacity), out="lt") for place in (first, second)]
    kept = zip(masks, within, strict=True)
    return [b.op("Mul", mask, b.op("Cast", place, to=TensorProto.INT64)) for mask, place in kept]
