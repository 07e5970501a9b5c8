"""Recognise the function of one value that an expert applies, from the ops that compute it in any spelling."""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand, produced_by, producer, scalar, source, split_constant
from graph_passes.record.block import FormError

GELU_CUBE = 0.044715
"""Of the tanh approximation, https://arxiv.org/abs/1606.08415."""

CLOSE = 1e-3
"""Relative: constants were rounded to half precision where the graph is."""

DEEPEST_PRODUCT = 6
"""Products of products that are looked through: each may double the factors."""


@dataclasses.dataclass(frozen=True)
class Nonlinearity:
    """``kind`` (see ``Activation``) of ``x``."""

    kind: str
    alpha: float
    x: gs.Tensor


def read_nonlinearity(result: gs.Tensor) -> Nonlinearity:
    """The function whose value is ``result``.

    Raises:
        FormError: none that is known.
    """
    found = find_nonlinearity(result)
    if found is None:
        node = producer(source(result))
        reason = "no activation before the down projection" if node is None else f"{node.op} ends no known activation"
        raise FormError(reason, node or result)
    return found


def find_nonlinearity(result: gs.Tensor) -> Nonlinearity | None:
    """The function whose value is ``result``; None where it is none that is known."""
    node = producer(source(result))
    if node is None:
        return None
    match node.op:
        case "Gelu":
            tanh = node.attrs.get("approximate") == "tanh"
            return Nonlinearity("gelu_tanh" if tanh else "gelu", 1.0, node.inputs[0])
        case "FastGelu" if operand(node, 1) is None:
            return Nonlinearity("gelu_tanh", 1.0, node.inputs[0])
        case "QuickGelu" | "Swish":
            default = 1.702 if node.op == "QuickGelu" else 1.0
            return Nonlinearity("silu", float(node.attrs.get("alpha", default)), node.inputs[0])
        case "Relu":
            return Nonlinearity("relu", 1.0, node.inputs[0])
        case "Pow":
            relu = produced_by(node.inputs[0], "Relu") if scalar(node.inputs[1]) == 2.0 else None
            return None if relu is None else Nonlinearity("relu2", 1.0, relu.inputs[0])
        case "Mul":
            return _squared_relu(node) or _silu(*node.inputs) or _silu(*reversed(node.inputs)) or _gelu(node)
    return None


def _squared_relu(node: gs.Node) -> Nonlinearity | None:
    relu = produced_by(node.inputs[0], "Relu") if node.inputs[0] is node.inputs[1] else None
    return None if relu is None else Nonlinearity("relu2", 1.0, relu.inputs[0])


def _silu(x: gs.Tensor, gate: gs.Tensor) -> Nonlinearity | None:
    """``x * Sigmoid(alpha * x)``."""
    sigmoid = produced_by(gate, "Sigmoid")
    if sigmoid is None:
        return None
    inner = sigmoid.inputs[0]
    if inner is x:
        return Nonlinearity("silu", 1.0, x)
    scaled = produced_by(inner, "Mul")
    parts = None if scaled is None else split_constant(scaled)
    return Nonlinearity("silu", parts[1], x) if parts is not None and parts[0] is x else None


def _gelu(node: gs.Node) -> Nonlinearity | None:
    """``x * 0.5 * (1 + Erf(x / sqrt(2)))``, or with tanh; the constants in any place."""
    constant, factors = _product(node.outputs[0])
    if len(factors) != 2 or not np.isclose(constant, 0.5, rtol=CLOSE):
        return None
    for x, factor in (factors, reversed(factors)):
        added = produced_by(factor, "Add")
        parts = None if added is None else split_constant(added)
        curve = None if parts is None or parts[1] != 1.0 else produced_by(parts[0], "Erf", "Tanh")
        if curve is not None and (_is_erf_of if curve.op == "Erf" else _is_tanh_of)(x, curve.inputs[0]):
            return Nonlinearity("gelu" if curve.op == "Erf" else "gelu_tanh", 1.0, x)
    return None


def _is_erf_of(x: gs.Tensor, inner: gs.Tensor) -> bool:
    """Whether ``inner`` is ``x / sqrt(2)``."""
    constant, factors = _product(inner)
    return factors == [x] and bool(np.isclose(constant, np.sqrt(0.5), rtol=CLOSE))


def _is_tanh_of(x: gs.Tensor, inner: gs.Tensor) -> bool:
    """Whether ``inner`` is ``sqrt(2 / pi) * (x + 0.044715 x^3)``."""
    constant, factors = _product(inner)
    added = produced_by(factors[0], "Add") if len(factors) == 1 else None
    if added is None or not np.isclose(constant, np.sqrt(2 / np.pi), rtol=CLOSE):
        return False
    cubes = [tensor for tensor in added.inputs if tensor is not x]
    if len(cubes) != 1:
        return False
    weight, terms = _product(cubes[0])
    return terms == [x] * 3 and bool(np.isclose(weight, GELU_CUBE, rtol=CLOSE))


def _product(tensor: gs.Tensor, depth: int = 0) -> tuple[float, list[gs.Tensor]]:
    """``tensor`` as a constant times factors; whole powers count as that many factors."""
    node = produced_by(tensor, "Mul", "Div", "Pow")
    if node is None or depth == DEEPEST_PRODUCT:
        return 1.0, [tensor]
    left, right = (scalar(term) for term in node.inputs)
    if node.op == "Pow":
        constant, factors = _product(node.inputs[0], depth + 1)
        whole = right is not None and right in (2.0, 3.0)
        return (constant ** int(right or 0), factors * int(right or 0)) if whole else (1.0, [tensor])
    if node.op == "Div":
        constant, factors = _product(node.inputs[0], depth + 1)
        return (constant / right, factors) if right else (1.0, [tensor])
    sides = [
        (value, []) if value is not None else _product(term, depth + 1)
        for value, term in zip((left, right), node.inputs, strict=True)
    ]
    return sides[0][0] * sides[1][0], [*sides[0][1], *sides[1][1]]
