"""ONNX Runtime's ``MoE`` and ``QMoE``, which select, weigh and add by themselves; and TensorRT's ``TRT_MoE``.

``MoE`` takes logits: softmax, top-k, renormalised or not. ``QMoE`` on CPU renormalises whatever its attribute says, so
other routers hand it what is ranked and, as ``router_weights``, what weighs.
"""

from typing import Any

import numpy as np
from onnx import TensorProto

from moe_spec.experts_op import NO_LIMIT
from tests.graph_passes.block_models import routers
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import MICROSOFT, Operand
from tests.graph_passes.block_models.quantize import BITS, IN_BLOCKS, pack
from tests.graph_passes.block_models.routers import scoring, topk

PARTS = {"fc1": ("gate_up_proj", "gate_proj", "up_proj"), "fc2": ("down_proj",), "fc3": ("up_proj",)}
"""Which projection is which; the first one that the block has."""

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu", "relu": "relu"}
"""The ops' names for activations; their gelu is the approximation with tanh."""


def emit_moe(block: Block) -> str:
    spec, b = block.spec, block.b
    routed = _between(block, torch.to_model(b, scoring.logits(block)))
    operands: list[Operand] = []
    for part in _parts(block).values():
        matrix = None if part is None else block.matrices[part]
        if matrix is not None and spec.transposed:  # the layout of ONNX Runtime before 1.22
            matrix = matrix.transpose(0, 2, 1)
        operands += [None if part is None or matrix is None else b.weight(block.parameter(part), matrix)]
        operands += [_bias(block, part)]
    attributes = _attributes(block) | {"normalize_routing_weights": int(spec.renormalize or spec.topk_first)}
    return b.op("MoE", block.hidden, routed, *_trimmed(operands), domain=MICROSOFT, **attributes)


def emit_qmoe(block: Block) -> str:
    spec, b = block.spec, block.b
    ranked, weighed = _ranked_and_weighed(block)
    parts = _parts(block)
    operands: list[Operand] = []
    zero_points: list[Operand] = []
    for part in parts.values():
        stored = (None, None, None) if part is None else _quantized(block, part)
        operands += [*stored[:2], _bias(block, part)]
        zero_points += [stored[2]]
    operands += [*zero_points, weighed]
    bits = BITS[spec.quantization or ""]
    attributes = _attributes(block) | {"expert_weight_bits": bits}
    attributes |= {"normalize_routing_weights": int(spec.renormalize or spec.topk_first)}
    attributes |= {"block_size": spec.block} if spec.quantization in IN_BLOCKS else {}
    return b.op("QMoE", block.hidden, ranked, *_trimmed(operands), domain=MICROSOFT, **attributes)


def emit_trt_moe(block: Block) -> str:
    """Hidden states, ids and weights (B, S, n), weights (E, in, out), biases all or none."""
    b = block.b
    routed = routers.slots(block)
    values = [block.hidden, b.op("Cast", routed.ids, to=TensorProto.INT32), routed.weights]
    by_sequence = [b.op("Unsqueeze", value, [0]) for value in values]
    names = ("gate_proj", "up_proj", "down_proj")
    weights = [torch.transposed(b, block.parameter(name), block.matrices[name]) for name in names]
    biases = [bias for name in names if (bias := _bias(block, name)) is not None]
    out = b.op("TRT_MoE", *by_sequence, *weights, *biases, domain="trt", activation_type=1)
    return b.op("Squeeze", out, [0])


def _parts(block: Block) -> dict[str, str | None]:
    """The projection behind fc1, fc2 and fc3; up_proj is fc1 where there is no gate."""
    found = {fc: next((name for name in names if name in block.matrices), None) for fc, names in PARTS.items()}
    return found if found["fc1"] != found["fc3"] else found | {"fc3": None}


def _attributes(block: Block) -> dict[str, Any]:
    spec, activation = block.spec, block.spec.activation
    common: dict[str, Any] = {"k": spec.top_k}
    if not spec.gated or spec.separate:
        return common | {"activation_type": ACTIVATIONS[activation.kind]}
    common |= {"swiglu_limit": activation.limit} if activation.limit != NO_LIMIT else {}
    return common | {
        "activation_type": "swiglu",
        "swiglu_fusion": 1 if spec.interleaved else 2,
        "activation_alpha": activation.alpha,
        "activation_beta": activation.up_offset,
    }


def _bias(block: Block, part: str | None) -> str | None:
    if part is None or not block.vectors:
        return None
    return block.b.weight(block.parameter(f"{part}_bias"), block.vectors[part])


def _between(block: Block, routed: str) -> str:
    """What exporters leave between the router and the op."""
    b, spec = block.b, block.spec
    if spec.between == "Reshape":
        return torch.reshape(b, routed, [-1, spec.experts])
    return b.op("Cast", routed, to=b.element_type) if spec.between == "Cast" else routed


def _ranked_and_weighed(block: Block) -> tuple[str, str | None]:
    """Logits alone where their softmax is renormalised; else what is ranked and the scores (T, E)."""
    spec, b = block.spec, block.b
    routed = scoring.logits(block)
    plain = spec.score == "softmax" and not spec.selection_bias and spec.groups is None
    if plain and (spec.renormalize or spec.topk_first):
        return _between(block, torch.to_model(b, routed)), None
    scored = scoring.scores(block, routed)
    _, ranked = topk.ranking(block, scored)
    return _between(block, torch.to_model(b, ranked)), torch.to_model(b, scoring.scaled(block, scored))


def _quantized(block: Block, part: str) -> tuple[str, str, str | None]:
    """Codes, packed where they are 4 bits; scales (E, out) or (E, out, blocks); zero points where they are given."""
    spec, b, quantized = block.spec, block.b, block.quantized[part]
    halves, name = BITS[spec.quantization or ""] == 4, block.parameter(part)
    in_blocks = spec.quantization in IN_BLOCKS
    codes = b.weight(f"{name}_quant", pack(quantized.codes) if halves else quantized.codes)
    scales = quantized.scales.astype(np.float32)
    stored = b.weight(f"{name}_scales", scales if in_blocks else scales[..., 0])
    if not spec.zero_points:
        return codes, stored, None
    assert quantized.zero_points is not None
    zero_points = quantized.zero_points if in_blocks else quantized.zero_points[..., 0]
    return codes, stored, b.weight(f"{name}_zero_points", pack(zero_points) if halves else zero_points)


def _trimmed(operands: list[Operand]) -> list[Operand]:
    """Without the inputs left out at the end."""
    while operands and operands[-1] is None:
        operands = operands[:-1]
    return operands
