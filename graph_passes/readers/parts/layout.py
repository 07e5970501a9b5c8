"""transformers' stacked expert weights into the record's axes, without reading them."""

import onnx_graphsurgeon as gs

from graph_passes.record.block import Experts, FormError
from graph_passes.weights.weight import Weight
from moe_spec.experts_op import ExpertsOp

EXPERTS_SCOPE = ".experts."
"""What stands between the name of a block and the name of an expert parameter in transformers."""


def scope_in(weight_name: str) -> str:
    """The path of the MoE block, where the exporter kept the name of an expert's weight.

    >>> scope_in("model.layers.0.mlp.experts.3.up_proj.weight"), scope_in("val_12")
    ('model.layers.0.mlp', '')
    """
    scope, found, _ = weight_name.rpartition(EXPERTS_SCOPE)
    return scope if found else ""


def from_stacked(up: Weight, down: Weight, up_bias: Weight | None, down_bias: Weight | None, op: ExpertsOp) -> Experts:
    """The record of experts stored as (E, out, in), or (E, in, out) where ``op.transposed``; see ``check_stacked``.

    ``up`` holds gate and up where ``op.gated``: halves of the output axis, or alternating where ``op.interleaved``.
    """
    up_EHN = up if op.transposed else up.swap()
    down_EFH = down if op.transposed else down.swap()
    if not op.gated:
        return Experts(up_EHN, None, down_EFH, up_bias, None, down_bias, op.activation)
    gate_EHF, up_EHF = (up_EHN.half(2, index, interleaved=op.interleaved) for index in (0, 1))
    biases = (None if up_bias is None else up_bias.half(1, index, interleaved=op.interleaved) for index in (0, 1))
    gate_bias, value_bias = biases
    return Experts(
        up_EHF=up_EHF,
        gate_EHF=gate_EHF,
        down_EFH=down_EFH,
        up_bias_EF=value_bias,
        gate_bias_EF=gate_bias,
        down_bias_EH=down_bias,
        activation=op.activation,
    )


def check_stacked(
    node: gs.Node, up: Weight, down: Weight, up_bias: Weight | None, down_bias: Weight | None, op: ExpertsOp
) -> None:
    """Refuse weights whose shapes do not fit together.

    Raises:
        FormError: with the shapes.
    """
    stored = [list(weight.shape) for weight in (up, down, up_bias, down_bias) if weight is not None]
    problem = FormError(f"the experts' weights have shapes {stored}, which do not fit together", node)
    if len(up.shape) != 3 or len(down.shape) != 3 or (up_bias is None) != (down_bias is None):
        raise problem
    experts, width, hidden = (up.shape[index] for index in ((0, 2, 1) if op.transposed else (0, 1, 2)))
    half = width // 2 if op.gated else width
    wanted = [
        (experts, half, hidden) if op.transposed else (experts, hidden, half),
        (experts, width),
        (experts, hidden),
    ]
    found = [down.shape, *(weight.shape for weight in (up_bias, down_bias) if weight is not None)]
    if found != wanted[: len(found)] or (op.gated and width % 2):
        raise problem
