"""What nodes say about axes: the letters of an Einsum, the numbers of a shape, the axes of a sum."""

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand, producer
from graph_passes.record.block import FormError

STORED = frozenset({"Cast", "DequantizeLinear", "Identity", "Transpose"})
"""Ops that a weight passes before it is multiplied or gathered."""


def subscripts(einsum: gs.Node) -> tuple[list[str], str]:
    """The letters of each operand, and of the result, of an Einsum with an explicit result.

    Raises:
        FormError: it has none, or an ellipsis.
    """
    equation = einsum.attrs["equation"]
    equation = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    left, arrow, result = equation.partition("->")
    if not arrow or "." in equation or left.count(",") != len(einsum.inputs) - 1:
        raise FormError(f"Einsum has the equation {equation!r}, expected one letter for each axis", einsum)
    return left.split(","), result


def ints(tensor: gs.Tensor | None) -> list[int]:
    """The values of an integer constant.

    Raises:
        FormError: it is computed.
    """
    if not isinstance(tensor, gs.Constant) or tensor.values.dtype.kind not in "iu":
        raise FormError("a shape or an axis is no integer constant", producer(tensor) or tensor)
    return [int(value) for value in tensor.values.reshape(-1)]


def axes_of(node: gs.Node) -> list[int]:
    """The ``axes`` of a node: an attribute until opset 12, an input since."""
    if "axes" in node.attrs:
        return [int(axis) for axis in node.attrs["axes"]]
    return ints(operand(node, 1)) if operand(node, 1) is not None else []
