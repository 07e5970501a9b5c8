"""The experts' arithmetic between their two projections, and the projections of one expert."""

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from moe_spec.experts_op import NO_LIMIT
from tests.graph_passes.block_models import parameters
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import Builder


def one_expert(block: Block, x: str, expert: int) -> str:
    """``experts[expert](x)`` (rows, H) of (rows, H), its matrices one by one."""
    projected = [parameters.project(block, x, part, expert) for part in block.matrices if part != "down_proj"]
    return parameters.project(block, middle(block.b, projected, rank=2), "down_proj", expert)


def stacked_matmul(block: Block, x: str) -> str:
    """All experts (E, rows, H) on ``x`` (E, rows, H) or (1, rows, H)."""

    def project(value: str, part: str) -> str:
        product = block.b.op("MatMul", value, parameters.stacked(block, part, transposed=True), out="bmm")
        return _biased(block, product, part, [1])

    projected = [project(x, part) for part in block.matrices if part != "down_proj"]
    return project(middle(block.b, projected, rank=3), "down_proj")


def stacked_einsum(block: Block, x: str, read: str, inner: str, out: str, bias_axes: Sequence[int] = ()) -> str:
    """All experts with Einsum: the axes of ``x``, of what is between the projections, and of what comes out."""

    def project(value: str, part: str, source: str, target: str) -> str:
        matrix = parameters.stacked(block, part, transposed=block.spec.transposed)
        axes = f"{source[-1]}{target[-1]}" if block.spec.transposed else f"{target[-1]}{source[-1]}"
        product = block.b.op("Einsum", value, matrix, equation=f"{source},e{axes}->{target}")
        return _biased(block, product, part, bias_axes)

    projected = [project(x, part, read, inner) for part in block.matrices if part != "down_proj"]
    return project(middle(block.b, projected, rank=len(inner)), "down_proj", inner, out)


def _biased(block: Block, product: str, part: str, axes: Sequence[int]) -> str:
    """Plus the bias (E, out), with ``axes`` inserted."""
    if not block.vectors:
        return product
    bias = parameters.stacked_bias(block, part)
    return block.b.op("Add", product, block.b.op("Unsqueeze", bias, axes) if axes else bias)


def middle(b: Builder, projected: list[str], rank: int) -> str:
    """What the down projection reads, of gate and up in one value, in two, or of up alone."""
    spec = b.spec
    if not spec.gated:
        return act(b, projected[0])
    if len(projected) == 2:
        gate, up = projected
    elif spec.op.interleaved:
        gate, up = (torch.columns(b, projected[0], start, torch.FAR, step=2, axis=rank - 1) for start in (0, 1))
    else:
        gate, up = torch.chunk(b, projected[0], -1, rank)
    activation = spec.activation
    if activation.limit != NO_LIMIT:
        gate = b.op("Clip", gate, None, torch.number(b, activation.limit, gate, b.element_type), out="clamp")
        limits = (torch.number(b, limit, up, b.element_type) for limit in (-activation.limit, activation.limit))
        up = b.op("Clip", up, *limits, out="clamp")
    if activation.up_offset:
        up = b.op("Add", up, b.scalar(activation.up_offset, b.element_type))
    return b.op("Mul", act(b, gate), up)


def act(b: Builder, x: str) -> str:
    """The activation, which is one op only where the opset has it."""
    number, activation = (lambda value: b.scalar(value, b.element_type)), b.spec.activation
    match activation.kind:
        case "silu":
            inner = x if activation.alpha == 1.0 else b.op("Mul", x, number(activation.alpha))
            return b.op("Mul", x, b.op("Sigmoid", inner), out="silu")
        case "gelu" | "gelu_tanh" if b.spec.opset >= 20:
            return b.op("Gelu", x, approximate="tanh" if activation.kind == "gelu_tanh" else "none")
        case "gelu":
            erf = b.op("Erf", b.op("Div", x, number(np.sqrt(2))))
            return b.op("Mul", x, b.op("Mul", number(0.5), b.op("Add", erf, number(1))), out="gelu")
        case "gelu_tanh":
            cubed = b.op("Mul", number(0.044715), b.op("Pow", x, b.scalar(3, TensorProto.FLOAT)))
            inner = b.op("Tanh", b.op("Mul", number(np.sqrt(2 / np.pi)), b.op("Add", x, cubed)))
            return b.op("Mul", x, b.op("Mul", number(0.5), b.op("Add", inner, number(1))), out="gelu")
        case "relu":
            return b.op("Relu", x)
        case _:
            return b.op("Pow", b.op("Relu", x), b.scalar(2, TensorProto.FLOAT))
