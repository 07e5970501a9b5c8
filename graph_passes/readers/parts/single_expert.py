"""Read one FFN of 2-D projections, walking back from its output to its input; and many of them as one record.

::

    output = act(x @ gate) * (x @ up) @ down      biases anywhere; gate and up in one matrix or in two; or no gate
"""

import dataclasses
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import source
from graph_passes.readers.parts.activation import INTERLEAVED, SEPARATE, read_activation
from graph_passes.readers.parts.layout import scope_in
from graph_passes.readers.parts.projection import Linear, read_linear
from graph_passes.record.block import Experts, FormError
from graph_passes.routers import Weights
from graph_passes.weights.weight import Weight, stack
from moe_spec.experts_op import Activation


@dataclasses.dataclass(frozen=True)
class ExpertParts:
    """One expert.

    Attributes:
        up: the up projection, or gate and up in one.
        gate: the gate's projection, where it has its own.
        down: the down projection.
        gating: how gate and up are held (see ``Middle``), None where there is no gate.
        activation: what happens between.
    """

    up: Linear
    gate: Linear | None
    down: Linear
    gating: str | None
    activation: Activation


def read_ffn(output: gs.Tensor, weights: Weights) -> tuple[gs.Tensor, ExpertParts]:
    """What the FFN that ends in ``output`` reads, and the FFN.

    Raises:
        FormError: with the first op that is no step of an FFN.
    """
    down = read_linear(output, weights)
    middle = read_activation(down.x)
    up = read_linear(middle.projection, weights)
    gate = None if middle.gate is None else read_linear(middle.gate, weights)
    if gate is not None and gate.x is not up.x:
        raise FormError("gate and up read different values", gate.node)
    return up.x, ExpertParts(up, gate, down, middle.gating, middle.activation)


def stack_experts(parts: Sequence[ExpertParts]) -> Experts:
    """Experts, in the order of their ids, as one record; nothing is read.

    Raises:
        FormError: they are not alike.
    """
    first = parts[0]
    for part in parts:
        if (part.activation, part.gating) != (first.activation, first.gating):
            raise FormError("experts have different activations", part.down.node)
    up, down = ([part.up for part in parts], [part.down for part in parts])
    up_EHF, up_bias = _stack(up)
    down_EFH, down_bias = _stack(down)
    gate_EHF, gate_bias = None, None
    if first.gating == SEPARATE:
        gate_EHF, gate_bias = _stack([part.gate for part in parts if part.gate is not None])
    elif first.gating is not None:
        gate_EHF, up_EHF = _halves(up_EHF, 2, first)
        gate_bias, up_bias = (None, None) if up_bias is None else _halves(up_bias, 1, first)
    if up_EHF.shape != (gate_EHF or up_EHF).shape or up_EHF.shape[::2] != down_EFH.shape[:2]:
        shapes = [list(weight.shape) for weight in (gate_EHF, up_EHF, down_EFH) if weight is not None]
        raise FormError(f"the experts' weights have shapes {shapes}, which do not fit together", first.down.node)
    return Experts(up_EHF, gate_EHF, down_EFH, up_bias, gate_bias, down_bias, first.activation)


def scope_of(parts: ExpertParts) -> str:
    """The path of the MoE block, where the exporter kept the name of an expert's weight."""
    return scope_in(source(parts.down.node.inputs[1], {"Transpose", "Identity"}).name)


def require_unbiased(experts: Experts, node: gs.Node) -> None:
    """Refuse biases where weights multiply what experts read: a token of weight 0 would still get them.

    Raises:
        FormError: there is one.
    """
    if any((experts.up_bias_EF, experts.gate_bias_EF, experts.down_bias_EH)):
        raise FormError("the weights multiply the input of experts that have biases", node)


def _halves(weight: Weight, axis: int, parts: ExpertParts) -> tuple[Weight, Weight]:
    if weight.shape[axis] % 2:
        raise FormError(f"gate and up share a weight of odd width {weight.shape[axis]}", parts.up.node)
    gate, up = (weight.half(axis, index, interleaved=parts.gating == INTERLEAVED) for index in (0, 1))
    return gate, up


def _stack(projections: Sequence[Linear]) -> tuple[Weight, Weight | None]:
    """Weights (E, in, out), left as they are stored, and biases (E, out)."""
    kernels = [projection.weight for projection in projections]
    biases = [projection.bias for projection in projections if projection.bias is not None]
    if len(biases) not in (0, len(projections)):
        raise FormError("some experts have biases and some have none", projections[0].node)
    try:
        if all(kernel.swapped for kernel in kernels):
            stacked = stack([kernel.swap() for kernel in kernels]).swap()
        else:
            stacked = stack(kernels)
        return stacked, stack(biases) if biases else None
    except ValueError as error:
        raise FormError(str(error), projections[0].node) from error
