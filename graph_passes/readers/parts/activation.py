"""Recognise what happens between the two projections of an expert, from the ops that compute it.

Read backwards from what the down projection multiplies::

    act(up)                              not gated
    act(gate) * up                       gate and up from Split or Slice (halves), strided Slice (interleaved), or
                                         projections of their own
    act(clip(gate)) * (clip(up) + c)     gpt-oss
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import before_whole_slices, number, operand, produced_by, producer, source, split_constant
from graph_passes.readers.parts.nonlinearity import find_nonlinearity, read_nonlinearity
from graph_passes.record.block import FormError
from moe_spec.experts_op import NO_LIMIT, Activation

HALVES, INTERLEAVED, SEPARATE = "halves", "interleaved", "separate"

PROJECTIONS = frozenset({"Add", "Concat", "Einsum", "Gemm", "MatMul", "MatMulNBits"})
"""Ops that give a projection of its own; the other side of a silu is none."""

UNBOUNDED = (-np.inf, np.inf)


@dataclasses.dataclass(frozen=True)
class Middle:
    """What was found between the projections.

    Attributes:
        activation: what is computed.
        projection: what it starts from: gate and up in one, or up alone.
        gating: how gate and up are held, None where there is no gate.
        gate: the gate's projection, where it has its own.
    """

    activation: Activation
    projection: gs.Tensor
    gating: str | None
    gate: gs.Tensor | None = None


def read_activation(result: gs.Tensor) -> Middle:
    """The activation that ends in ``result``.

    Raises:
        FormError: no known activation.
    """
    result = source(result)
    node = produced_by(result, "Mul")
    if node is not None:
        for act, up in (node.inputs, reversed(node.inputs)):
            middle = _gated(node, act, up)
            if middle is not None:
                return middle
    function = read_nonlinearity(result)
    x, (low, high) = _clamped(function.x)
    if low != -high:
        raise FormError("what the activation reads is clamped to an uneven range", producer(function.x))
    return Middle(Activation(function.kind, function.alpha, _limit(high)), source(x), None)


def _gated(node: gs.Node, act: gs.Tensor, up: gs.Tensor) -> Middle | None:
    """``act(gate) * up`` where gate and up are two parts of one projection, or one each."""
    function = find_nonlinearity(act)
    if function is None:
        return None
    up, up_offset = _added(up)
    (up, up_range), (gate, gate_range) = _clamped(up), _clamped(function.x)
    gating = _gating(gate, up)
    if gating is None:
        return None
    limit = _limit(up_range[1])
    if up_range != (-up_range[1], up_range[1]) or gate_range != (-np.inf, up_range[1]):
        raise FormError("gate and up are not clamped to one limit, gate from above and up on both sides", node)
    activation = Activation(function.kind, function.alpha, limit, up_offset)
    if gating == SEPARATE:
        return Middle(activation, source(up), gating, source(gate))
    part = _part(up)
    assert part is not None
    return Middle(activation, source(part[0]), gating)


def _gating(gate: gs.Tensor, up: gs.Tensor) -> str | None:
    """How gate and up are held; None where these two are none."""
    gate_part, up_part = _part(gate), _part(up)
    if gate_part is None and up_part is None:
        both = all(_is_projection(tensor) for tensor in (gate, up))
        return SEPARATE if both and source(gate) is not source(up) else None
    if gate_part is None or up_part is None or gate_part[:2] != up_part[:2]:
        return None
    if (gate_part[2], up_part[2]) != (0, 1):
        raise FormError("gate and up stand in the other order", producer(gate))
    return gate_part[1]


def _is_projection(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is a projection, or one times a number for each token and expert."""
    node = produced_by(source(tensor), "Mul")
    if node is None:
        return produced_by(source(tensor), *PROJECTIONS) is not None
    return any(
        produced_by(column, "Unsqueeze") and produced_by(source(value), *PROJECTIONS)
        for column, value in (node.inputs, reversed(node.inputs))
    )


def _added(tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    node = produced_by(tensor, "Add")
    parts = None if node is None else split_constant(node)
    return (tensor, 0.0) if parts is None else parts


def _clamped(tensor: gs.Tensor) -> tuple[gs.Tensor, tuple[float, float]]:
    """What is clamped, and to which range, by Clip or by Min and Max."""
    low, high = UNBOUNDED
    node = produced_by(tensor, "Clip", "Min", "Max")
    while node is not None:
        if node.op == "Clip":
            below, above = (number(operand(node, index)) for index in (1, 2))
            tensor = node.inputs[0]
        else:
            parts = split_constant(node) if len(node.inputs) == 2 else None
            if parts is None:
                break
            tensor, bound = parts
            below, above = (bound, None) if node.op == "Max" else (None, bound)
        low = low if below is None else max(low, below)
        high = high if above is None else min(high, above)
        node = produced_by(tensor, "Clip", "Min", "Max")
    return tensor, (low, high)


def _limit(high: float) -> float:
    return NO_LIMIT if high == np.inf else high


def _part(tensor: gs.Tensor) -> tuple[gs.Tensor, str, int] | None:
    """(projection, how it is parted, which part) where ``tensor`` is one of two parts of a projection."""
    node = produced_by(tensor, "Split", "Slice", "SequenceAt")
    if node is None:
        return None
    if node.op == "Split":
        return (node.inputs[0], HALVES, int(node.outputs[1] is tensor)) if len(node.outputs) == 2 else None
    if node.op == "SequenceAt":
        split, index = produced_by(node.inputs[0], "SplitToSequence"), number(node.inputs[1])
        return None if split is None or index is None else (split.inputs[0], HALVES, int(index))
    start, step = _start(node), number(operand(node, 4))
    if step == 2.0:
        return (before_whole_slices(node.inputs[0]), INTERLEAVED, int(start)) if start in (0.0, 1.0) else None
    return None if start is None else (before_whole_slices(node.inputs[0]), HALVES, int(start > 0))


def _start(cut: gs.Node) -> float | None:
    """Where a Slice starts; any number above 0 where that is computed, and is where another one ends that starts at 0.

    torch.chunk computes it from a length; that the two are halves shows in the shapes of the weights.
    """
    start = number(operand(cut, 1))
    if start is not None:
        return start
    others = (node for node in cut.inputs[0].outputs if node.op == "Slice" and number(operand(node, 1)) == 0.0)
    return 1.0 if any(operand(node, 2) is cut.inputs[1] for node in others) else None
