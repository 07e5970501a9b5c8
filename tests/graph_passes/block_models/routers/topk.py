"""Routers that rank with TopK."""

import numpy as np
from onnx import TensorProto, helper

from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import Builder
from tests.graph_passes.block_models.routers.scoring import Slots, logits, renormalized, scaled, scores


def slots(block: Block) -> Slots:
    """The K best by logits or by scores."""
    spec, b = block.spec, block.b
    routed = logits(block)
    if spec.topk_first:
        ids, values = select(block, routed)
        weights = scores(block, values, out="selected")
    else:
        ids, weights = select(block, scores(block, routed))
    weights = scaled(block, renormalized(block, weights))
    if spec.own_scales:
        own = b.weight(f"{block.name}.router.per_expert_scale", block.tensors["own_scales"].astype(np.float32))
        weights = b.op("Mul", weights, b.op("GatherND", own, b.op("Unsqueeze", ids, [-1])), out="scaled_each")
    return Slots(ids, weights, routed)


def masked(block: Block) -> str:
    """(T, E): the scores times a mask of the K best."""
    b = block.b
    scored = scores(block, logits(block))
    ids, _ = select(block, scored)
    mask = _scattered_ones(b, scored, ids)
    return scaled(block, renormalized(block, b.op("Mul", scored, mask)))


def in_minus_inf(block: Block) -> str:
    """(T, E): the K best logits scattered into -inf, then scored (Llama 4; KeepTopK of Shazeer et al. 2017)."""
    b = block.b
    routed = logits(block)
    values, ids = best(b, routed, block.spec.top_k)
    empty = b.op("Expand", b.scalar(-np.inf), b.op("Shape", routed, start=0), out="full_like")
    kept = b.op("ScatterElements", empty, ids, values, out="scatter", axis=1, reduction="none")
    return scaled(block, scores(block, kept))


def best(b: Builder, values: str, count: int, out: tuple[str, str] = ("best", "ids"), is_sorted: int = 1) -> list[str]:
    """Values and indices of the ``count`` largest of the last axis."""
    return b.ops("TopK", values, [count], out=out, axis=-1, largest=1, sorted=is_sorted)


def select(block: Block, scored: str) -> tuple[str, str]:
    """Ids and scores of the K best by scores (T, E), a selection bias and groups."""
    choice, ranked = ranking(block, scored)
    values, ids = best(block.b, ranked, block.spec.top_k)
    if ranked == scored or (choice == scored and block.spec.group_fill == 0):
        return ids, values
    return ids, block.b.op("GatherElements", scored, ids, out="selected", axis=1)


def ranking(block: Block, scored: str) -> tuple[str, str]:
    """(T, E): the scores plus the selection bias, and what of that is ranked once groups have excluded some."""
    spec, b = block.spec, block.b
    choice = scored
    if spec.selection_bias:
        bias = block.tensors["selection_bias"].astype(np.float32)
        stored = bias[None] if spec.bias_row else bias
        choice = b.op("Add", scored, b.weight(f"{block.name}.gate.e_score_correction_bias", stored), out="choice")
    return choice, choice if spec.groups is None else _only_best_groups(block, choice)


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
    mask = _scattered_ones(b, group_scores, ids)
    wide = b.op("Expand", b.op("Unsqueeze", mask, [-1]), [1, count, width])
    wide = b.op("Identity", wide, out="clone") if spec.unoptimised else wide
    allowed = b.op("Cast", torch.reshape(b, wide, [-1, spec.experts]), out="allowed", to=TensorProto.BOOL)
    excluded = b.op("Not", allowed, out="excluded")
    return b.op("Where", excluded, torch.number(b, spec.group_fill, choice), choice, out="ranked")


def _scattered_ones(b: Builder, like: str, ids: str) -> str:
    """1 at ``ids`` of the last axis, 0 elsewhere; float32 in the shape of ``like`` (T, n)."""
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1])
    zeros = torch.zeros_like(b, like, TensorProto.FLOAT)
    ones = b.op("ConstantOfShape", b.op("Shape", ids, start=0), value=one)
    return b.op("ScatterElements", zeros, ids, ones, out="scatter", axis=1, reduction="none")
