"""How far the input of a router can reach: known behind a normalisation, unknown elsewhere.

Behind a LayerNormalization or RMSNormalization (https://arxiv.org/abs/1910.07467), ``hidden = n * scale + bias`` with
``|n|_2 <= sqrt(H)`` for every input, so ``w @ hidden`` lies within ``|w * scale|_2 * sqrt(H)`` of ``w @ bias``.
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand, produced_by, scalar, source, split_constant
from graph_passes.weights.stored import of_constant

Vector = npt.NDArray[np.float64]

OPS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1, None),
    "SimplifiedLayerNormalization": (1, None),
    "SkipSimplifiedLayerNormalization": (2, None),
    "SkipLayerNormalization": (2, 3),
}
"""Normalisations as one op: which inputs are scale and bias."""


@dataclasses.dataclass(frozen=True)
class Normalised:
    """``n * scale + bias`` with a ``n`` (H,) of norm sqrt(H) at most; both are (H,)."""

    scale: Vector
    bias: Vector


def read_norm(hidden: gs.Tensor, width: int, directory: Path) -> Normalised | None:
    """The normalisation over the last axis, of ``width``, that gives ``hidden``; None where there is none."""
    tensor = source(hidden)
    node = produced_by(tensor, *OPS)
    if node is not None:
        if node.attrs.get("axis", -1) != -1 or node.outputs[0] is not tensor:
            return None
        scale, bias = (None if index is None else operand(node, index) for index in OPS[node.op])
        return _normalised(scale, bias, width, directory)
    return _read_product(tensor, width, directory)


def _normalised(scale: gs.Tensor | None, bias: gs.Tensor | None, width: int, directory: Path) -> Normalised | None:
    values = []
    for tensor, default in ((scale, 1.0), (bias, 0.0)):
        if tensor is None:
            values.append(np.full(width, default))
        elif isinstance(tensor, gs.Constant) and tuple(tensor.shape) == (width,):
            values.append(of_constant(tensor, directory).load().astype(np.float64))
        else:
            return None
    return Normalised(*values)


def _read_product(tensor: gs.Tensor, width: int, directory: Path) -> Normalised | None:
    """``scale * (x / sqrt(mean(x ** 2) + eps))``, as torch exports an RMSNorm."""
    product = produced_by(tensor, "Mul")
    if product is None:
        return None
    for scale, rest in (product.inputs, reversed(product.inputs)):
        scale = source(scale, {"Cast", "Identity"})
        if isinstance(scale, gs.Constant) and _is_unit(source(rest, {"Cast", "Identity"})):
            return _normalised(scale, None, width, directory)
    return None


def _is_unit(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is ``x / sqrt(mean(x ** 2) + eps)`` over the last axis."""
    node = produced_by(tensor, "Mul", "Div")
    if node is None:
        return False
    x, root = node.inputs
    if node.op == "Div":
        return _is_root(root, x)
    inverses = ((x, produced_by(root, "Reciprocal")), (root, produced_by(x, "Reciprocal")))
    return any(inverse is not None and _is_root(inverse.inputs[0], value) for value, inverse in inverses)


def _is_root(tensor: gs.Tensor, x: gs.Tensor) -> bool:
    """Whether ``tensor`` is ``sqrt(mean(x ** 2) + eps)``."""
    root = produced_by(tensor, "Sqrt")
    total = None if root is None else produced_by(root.inputs[0], "Add")
    parts = None if total is None else split_constant(total)
    mean = None if parts is None or parts[1] < 0 else produced_by(parts[0], "ReduceMean")
    if mean is None:
        return False
    axes = operand(mean, 1)
    over = list(mean.attrs.get("axes", [])) if axes is None else [] if scalar(axes) is None else [int(axes.values[0])]
    square = produced_by(mean.inputs[0], "Pow", "Mul")
    if over != [-1] or square is None:
        return False
    return (
        square.inputs[0] is x
        and (square.inputs[1] is x or scalar(square.inputs[1]) == 2.0)
        and (square.op == "Pow" or square.inputs[1] is x)
    )
