"""Read numbers that an exporter without an optimiser still casts, expands, reshapes and puts together."""

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand, produced_by, scalar, source


def constant_value(tensor: gs.Tensor | None) -> float | None:
    """The one number that ``tensor`` is full of, whatever its shape."""
    if tensor is None:
        return None
    tensor = source(tensor)
    node = produced_by(tensor, "Expand", "ConstantOfShape", "CastLike", "Mul")
    if node is None:
        if not isinstance(tensor, gs.Constant) or not tensor.shape:
            return scalar(tensor)
        values = np.unique(tensor.values)
        return float(values[0]) if len(values) == 1 else None
    if node.op == "ConstantOfShape":
        value = node.attrs.get("value")
        return 0.0 if value is None else float(np.ravel(getattr(value, "values", value))[0])
    if node.op == "Mul":
        return 0.0 if 0.0 in (scalar(operand(node, 0)), scalar(operand(node, 1))) else None
    return constant_value(node.inputs[0])


def split_number(node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """``(x, c)`` of a binary node with one constant number ``c``, on either side."""
    for this, other in ((0, 1), (1, 0)):
        value = constant_value(node.inputs[other])
        if value is not None and constant_value(node.inputs[this]) is None:
            return node.inputs[this], value
    return None


def numbers(tensor: gs.Tensor | None) -> list[int]:
    """The entries of a shape or of axes; -1 for what is computed."""
    if tensor is None:
        return []
    tensor = source(tensor)
    if isinstance(tensor, gs.Constant):
        whole = tensor.values.dtype.kind in "iu"
        return [int(value) if whole else -1 for value in tensor.values.reshape(-1)]
    node = produced_by(tensor, "Concat")
    return [-1] if node is None else [entry for part in node.inputs for entry in numbers(part)]


def whole_number(tensor: gs.Tensor | None) -> int | None:
    """The one integer that ``tensor`` is full of, whatever its type."""
    value = constant_value(tensor)
    return int(value) if value is not None and value.is_integer() else None
