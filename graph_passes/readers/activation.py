"""Recognise what happens between the two projections of an expert, from the ops that compute it.

Read backwards from what the down projection multiplies::

    act(up)                              not gated
    act(gate) * up                       gate and up from Split (halves) or strided Slice (interleaved)
    act(clip(gate)) * (clip(up) + c)     gpt-oss
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.block import FormError
from graph_passes.walk import operand, produced_by, producer, scalar, source, split_constant
from moe_spec.experts_op import NO_LIMIT, Activation

HALVES, INTERLEAVED = "halves", "interleaved"


@dataclasses.dataclass(frozen=True)
class Middle:
    """What was found: the activation, the projection that it starts from, and how that one holds gate and up."""

    activation: Activation
    projection: gs.Tensor
    gating: str | None


def read_activation(result: gs.Tensor) -> Middle:
    """The activation that ends in ``result``.

    Raises:
        FormError: no known activation.
    """
    result = source(result)
    node = produced_by(result, "Mul")
    if node is not None:
        for act, up in (node.inputs, reversed(node.inputs)):
            middle = _gated(act, up)
            if middle is not None:
                return middle
    kind, alpha, projection = _act(result)
    return Middle(Activation(kind, alpha), source(projection), None)


def _gated(act: gs.Tensor, up: gs.Tensor) -> Middle | None:
    """``act(gate) * up`` where gate and up are the two parts of one projection."""
    up, up_offset = _added(up)
    up, limit = _clipped(up)
    up_part = _part(up)
    if up_part is None:
        return None
    try:
        kind, alpha, gate = _act(act)
    except FormError:
        return None
    gate, _ = _clipped(gate)
    gate_part = _part(gate)
    if gate_part is None or gate_part[0] is not up_part[0] or gate_part[1] != up_part[1]:
        return None
    if (gate_part[2], up_part[2]) != (0, 1):
        raise FormError("gate and up stand in the other order", producer(gate))
    return Middle(Activation(kind, alpha, limit, up_offset), source(gate_part[0]), gate_part[1])


def _act(result: gs.Tensor) -> tuple[str, float, gs.Tensor]:
    """(kind, alpha, x) of ``result = act(x)``."""
    node = producer(result)
    if node is None:
        raise FormError("no activation before the down projection", result)
    if node.op == "Gelu":
        return ("gelu_tanh" if node.attrs.get("approximate") == "tanh" else "gelu"), 1.0, node.inputs[0]
    if node.op == "Relu":
        return "relu", 1.0, node.inputs[0]
    if node.op == "Pow" and scalar(node.inputs[1]) == 2.0 and (relu := produced_by(node.inputs[0], "Relu")):
        return "relu2", 1.0, relu.inputs[0]
    if node.op == "Mul":
        silu = _silu(*node.inputs) or _silu(*reversed(node.inputs))
        if silu is not None:
            return "silu", silu[1], silu[0]
        erf = _erf_gelu(node)
        if erf is not None:
            return "gelu", 1.0, erf
    raise FormError(f"{node.op} ends no known activation", node)


def _silu(x: gs.Tensor, gate: gs.Tensor) -> tuple[gs.Tensor, float] | None:
    """``x * Sigmoid(alpha * x)``."""
    sigmoid = produced_by(gate, "Sigmoid")
    if sigmoid is None:
        return None
    inner = sigmoid.inputs[0]
    if inner is x:
        return x, 1.0
    scaled = produced_by(inner, "Mul")
    parts = None if scaled is None else split_constant(scaled)
    return (x, parts[1]) if parts is not None and parts[0] is x else None


def _erf_gelu(node: gs.Node) -> gs.Tensor | None:
    """``x * 0.5 * (1 + Erf(x / sqrt(2)))``, the constants in any place."""
    factors: list[gs.Tensor] = []
    constant = _flatten_product(node, factors)
    sums = [(factor, add) for factor in factors if (add := produced_by(factor, "Add"))]
    for factor, add in sums:
        parts = split_constant(add)
        erf = None if parts is None or parts[1] != 1.0 else produced_by(parts[0], "Erf")
        rest = [other for other in factors if other is not factor]
        if erf is not None and len(rest) == 1 and np.isclose(constant, 0.5):
            return rest[0]
    return None


def _flatten_product(node: gs.Node, factors: list[gs.Tensor]) -> float:
    constant = 1.0
    for tensor in node.inputs:
        value, inner = scalar(tensor), produced_by(tensor, "Mul")
        if value is not None:
            constant *= value
        elif inner is not None:
            constant *= _flatten_product(inner, factors)
        else:
            factors.append(tensor)
    return constant


def _added(tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    node = produced_by(tensor, "Add")
    parts = None if node is None else split_constant(node)
    return (tensor, 0.0) if parts is None else parts


def _clipped(tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    node = produced_by(tensor, "Clip")
    limit = None if node is None else scalar(operand(node, 2))
    return (tensor, NO_LIMIT) if node is None or limit is None else (node.inputs[0], limit)


def _part(tensor: gs.Tensor) -> tuple[gs.Tensor, str, int] | None:
    """(projection, how it is parted, which part) where ``tensor`` is one of two parts of a projection."""
    node = produced_by(tensor, "Split", "Slice")
    if node is None:
        return None
    if node.op == "Split":
        if len(node.outputs) != 2:
            return None
        return node.inputs[0], HALVES, int(node.outputs[1] is tensor)
    start, step = scalar(operand(node, 1)), scalar(operand(node, 4))
    return (node.inputs[0], INTERLEAVED, int(start)) if step == 2.0 and start in (0.0, 1.0) else None
