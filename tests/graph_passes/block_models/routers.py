"""From the hidden states to K ids and K weights a token, with the ops that exporters write."""

from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto, helper

from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import Builder

SCORES = {"softmax": "Softmax", "sigmoid": "Sigmoid"}


class Slots(NamedTuple):
    """Ids (T, K) int64, weights (T, K), logits (T, E)."""

    ids: str
    weights: str
    logits: str


def slots(block: Block) -> Slots:
    """The weights in the model's type unless ``weights_float``."""
    routed = SLOTS[block.spec.selection](block)
    return routed if block.spec.weights_float else routed._replace(weights=torch.to_model(block.b, routed.weights))


def logits(block: Block) -> str:
    """(T, E), float32 unless ``router_cast`` is ``scores``."""
    spec, b = block.spec, block.b
    hidden, weight, bias = block.hidden, block.tensors["router"], block.tensors["router_bias"]
    if spec.router_cast == "hidden":
        hidden, weight, bias = torch.to_float(b, hidden), weight.astype(np.float32), bias.astype(np.float32)
    product = torch.linear(b, hidden, f"{block.name}.gate", weight, bias if spec.router_bias else None, out="logits")
    return torch.to_float(b, product) if spec.router_cast == "logits" else product


def scores(block: Block, values: str, out: str = "scores") -> str:
    """Of logits (T, n), in float32."""
    spec, b = block.spec, block.b
    axis: dict[str, Any] = {"axis": -1} if spec.score == "softmax" else {}
    scored = b.op(SCORES[spec.score], values, out=out, **axis)
    return torch.to_float(b, scored) if spec.router_cast == "scores" else scored


def scaled(block: Block, weights: str) -> str:
    """The weights times the scale, where there is one."""
    scale = block.spec.scale
    return weights if scale == 1.0 else block.b.op("Mul", weights, block.b.scalar(scale), out="gates")


def renormalized(block: Block, weights: str, axis: int = -1) -> str:
    """The weights over their sum along ``axis``, where the spec says so."""
    spec, b = block.spec, block.b
    if not spec.renormalize:
        return weights
    summed = torch.total(b, weights, axis, keepdims=1)
    if spec.eps and spec.eps_clips:
        summed = b.op("Clip", summed, b.scalar(spec.eps), out="clamp")
    elif spec.eps:
        summed = b.op("Add", summed, b.scalar(spec.eps))
    return b.op("Div", weights, summed, out="normalized")


def best(b: Builder, values: str, count: int, out: tuple[str, str] = ("best", "ids"), is_sorted: int = 1) -> list[str]:
    """Values and indices of the ``count`` largest of the last axis."""
    return b.ops("TopK", values, [count], out=out, axis=-1, largest=1, sorted=is_sorted)


def _topk_slots(block: Block) -> Slots:
    spec, b = block.spec, block.b
    routed = logits(block)
    if spec.topk_first:
        values, ids = best(b, routed, spec.top_k)
        weights = scores(block, values, out="selected")
    else:
        ids, weights = select(block, scores(block, routed))
    return Slots(ids, scaled(block, renormalized(block, weights)), routed)


def select(block: Block, scored: str) -> tuple[str, str]:
    """Ids and scores of the K best by scores (T, E), a selection bias and groups."""
    spec, b = block.spec, block.b
    choice = scored
    if spec.selection_bias:
        bias = block.tensors["selection_bias"].astype(np.float32)
        stored = bias[None] if spec.bias_row else bias
        choice = b.op("Add", scored, b.weight(f"{block.name}.gate.e_score_correction_bias", stored), out="choice")
    ranked = choice if spec.groups is None else _only_best_groups(block, choice)
    values, ids = best(b, ranked, spec.top_k)
    if ranked == scored or (choice == scored and spec.group_fill == 0):
        return ids, values
    return ids, b.op("GatherElements", scored, ids, out="selected", axis=1)


def _only_best_groups(block: Block, choice: str) -> str:
    """(T, E) with experts outside the best groups set to ``group_fill``."""
    spec, b = block.spec, block.b
    assert spec.groups is not None
    count, width = spec.groups.count, spec.experts // spec.groups.count
    grouped = torch.reshape(b, choice, [-1, count, width])
    if spec.groups.scored_by == 1:
        group_scores = torch.reduce_max(b, grouped, keepdims=0, out="group_scores")
    else:
        pair, _ = best(b, grouped, spec.groups.scored_by, ("pair", "pair_ids"))
        group_scores = torch.total(b, pair, -1, out="group_scores")
    _, ids = best(b, group_scores, spec.groups.selected, ("group_best", "group_ids"), is_sorted=0)
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1])
    ones = b.op("ConstantOfShape", b.op("Shape", ids, start=0), value=one)
    zeros = torch.zeros_like(b, group_scores, TensorProto.FLOAT)
    mask = b.op("ScatterElements", zeros, ids, ones, out="scatter", axis=1, reduction="none")
    wide = b.op("Expand", b.op("Unsqueeze", mask, [-1]), [1, count, width])
    allowed = b.op("Cast", torch.reshape(b, wide, [-1, spec.experts]), out="allowed", to=TensorProto.BOOL)
    excluded = b.op("Not", allowed, out="excluded")
    return b.op("Where", excluded, b.scalar(spec.group_fill), choice, out="ranked")


SLOTS = {"topk": _topk_slots}
