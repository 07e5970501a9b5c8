"""What every router does: logits, scores, and weights renormalised and scaled."""

from typing import NamedTuple

import numpy as np
from onnx import TensorProto, helper

from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block


class Slots(NamedTuple):
    """Ids (T, K) int64, weights (T, K), logits (T, E)."""

    ids: str
    weights: str
    logits: str


def logits(block: Block, *, by_sequence: bool = False) -> str:
    """(T, E), or (B, S, E) ``by_sequence``; float32 unless ``router_cast`` is ``scores``."""
    spec, b = block.spec, block.b
    hidden, rank = (block.x, spec.rank) if by_sequence else (block.hidden, 2)
    weight, bias = block.tensors["router"], block.tensors["router_bias"]
    if spec.router_cast == "hidden":
        hidden, weight, bias = torch.to_float(b, hidden), weight.astype(np.float32), bias.astype(np.float32)
    name, added = f"{block.name}.gate", bias if spec.router_bias else None
    product = torch.linear(b, hidden, name, weight, added, rank=rank, out="logits")
    result = torch.to_float(b, product) if spec.router_cast == "logits" else product
    if spec.returns_logits:
        kind = b.element_type if spec.router_cast == "scores" else TensorProto.FLOAT
        lengths = ["tokens"] if rank == 2 else ["batch", "sequence"]
        b.outputs.append(helper.make_tensor_value_info(result, kind, [*lengths, spec.experts]))
    return result


def scores(block: Block, values: str, out: str = "scores") -> str:
    """Of logits (T, n), in float32, as which torch computes a softmax whether it is one already or not."""
    spec, b = block.spec, block.b
    if spec.score == "sigmoid":
        scored = b.op("Sigmoid", values, out=out)
    elif spec.score == "sqrtsoftplus":
        linear = b.op("Greater", values, b.scalar(20.0), out="linear")
        scored = b.op("Sqrt", b.op("Where", linear, values, b.op("Softplus", values), out="softplus"), out=out)
    else:
        scored = b.op("Softmax", values, out=out, axis=-1)
        if spec.unoptimised and spec.router_cast != "scores":
            return b.op("Cast", scored, out=out, to=TensorProto.FLOAT)
    return torch.to_float(b, scored) if spec.router_cast == "scores" else scored


def renormalized(block: Block, weights: str) -> str:
    """The weights over their sum along the last axis, where the spec says so."""
    if not block.spec.renormalize:
        return weights
    summed = torch.total(block.b, weights, -1, keepdims=1)
    return block.b.op("Div", weights, above_eps(block, summed), out="normalized")


def above_eps(block: Block, summed: str) -> str:
    """A sum of weights by which one can divide."""
    spec, b = block.spec, block.b
    if not spec.eps:
        return summed
    if spec.eps_clips:
        return b.op("Clip", summed, torch.number(b, spec.eps, summed), out="clamp")
    return b.op("Add", summed, b.scalar(spec.eps))


def scaled(block: Block, weights: str) -> str:
    """The weights times the scale, where there is one."""
    scale = block.spec.scale
    return weights if scale == 1.0 else block.b.op("Mul", weights, block.b.scalar(scale), out="gates")
