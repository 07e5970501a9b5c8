"""Read the projection behind a router's logits, and fold every bias and mask that is added to it into one vector.

::

    logits = [Add constant | Where(constant, ., constant)]* of  Gemm(hidden, weight, bias)
                                                                MatMul(hidden, weight)
                                                                Einsum(hidden, weight)
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand, produced_by, producer, source
from graph_passes.record.block import FormError
from graph_passes.routers.parameters import Weights, block_scope
from graph_passes.weights.weight import Array, Weight, from_array

UNTOUCHED = frozenset({"Cast", "CastLike", "Identity"})


@dataclasses.dataclass(frozen=True)
class Linear:
    """``hidden (T, H) @ weight_EH.T + bias_E``; ``scope`` is the block's path, where the weight's name tells it."""

    hidden: gs.Tensor
    weight_EH: Weight
    bias_E: Weight | None
    scope: str


@dataclasses.dataclass(frozen=True)
class _Masked:
    """A ``Where`` on the way: rows that are not ``kept`` have the constant ``fill`` as their logit."""

    node: gs.Node
    kept: Array
    fill: float


def read_linear(logits: gs.Tensor, weights: Weights) -> Linear:
    """The projection behind ``logits`` (T, E).

    Raises:
        FormError: with the node that is neither the projection nor a constant bias or mask.
    """
    steps: list[gs.Constant | _Masked] = []
    tensor, step = source(logits), None
    while (peeled := _peel(tensor)) is not None:
        tensor, step = source(peeled[0]), peeled[1]
        steps.append(step)
    node = producer(tensor)
    if node is None or node.op not in ("Gemm", "MatMul", "Einsum"):
        raise FormError("the logits are no Gemm or MatMul", node or logits)
    weight, scope = _read_kernel(node, weights)
    added = operand(node, 2) if node.op == "Gemm" else None
    if isinstance(added, gs.Variable):
        raise FormError("the router's bias is no constant", node)
    if added is not None:
        steps.append(added)
    weight, bias = _fold(weight, steps[::-1], weights)
    return Linear(source(node.inputs[0], {"Identity"}), weight, bias, scope)


def _peel(tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Constant | _Masked] | None:
    """(what a constant was added to, or masked by; that constant) where such a node computes ``tensor``."""
    node = produced_by(tensor, "Add", "Where")
    if node is None:
        return None
    if node.op == "Add":
        for this, other in ((0, 1), (1, 0)):
            constant = source(node.inputs[other], UNTOUCHED)
            if isinstance(constant, gs.Constant):
                return node.inputs[this], constant
        return None
    mask, *branches = (source(value, UNTOUCHED) for value in node.inputs)
    for index, value in enumerate(branches):
        if isinstance(mask, gs.Constant) and isinstance(value, gs.Constant) and np.prod(value.shape, dtype=int) == 1:
            kept = np.ravel(mask.values).astype(bool)
            return branches[1 - index], _Masked(node, ~kept if index == 0 else kept, float(value.values.reshape(-1)[0]))
    return None


def _fold(weight: Weight, steps: list[gs.Constant | _Masked], weights: Weights) -> tuple[Weight, Weight | None]:
    """``weight`` and one bias that do what the ``steps`` do, in this order."""
    if not steps:
        return weight, None
    experts = weight.shape[0]
    if len(steps) == 1 and isinstance(steps[0], gs.Constant) and np.prod(steps[0].shape, dtype=int) == experts:
        return weight, weights.flat(steps[0], experts)
    bias = np.zeros(experts, np.float32)
    for step in steps:
        if isinstance(step, gs.Constant):
            bias = bias + _vector(step, experts, weights)
            continue
        if len(step.kept) != experts:
            raise FormError(f"a mask over the logits has {len(step.kept)} entries, expected {experts}", step.node)
        bias = np.where(step.kept, bias, np.float32(step.fill))
        if np.isfinite(step.fill):  # the logit is this constant, whatever the token
            weight = _zero_rows(weight, step.kept)
    return weight, from_array(bias)


def _zero_rows(weight: Weight, kept: Array) -> Weight:
    return weight.map(weight.shape, lambda rows: np.where(kept[:, None], rows, rows.dtype.type(0))).cached()


def _vector(constant: gs.Constant, experts: int, weights: Weights) -> Array:
    weight = weights.of(constant)
    if np.prod(weight.shape, dtype=int) == 1:
        return np.full(experts, weight.load().reshape(-1)[0], np.float32)
    return weights.flat(constant, experts).load().astype(np.float32)


def _read_kernel(node: gs.Node, weights: Weights) -> tuple[Weight, str]:
    """The matrix (E, H) that ``node`` multiplies by, and the block's path if its name tells it."""
    if any(node.attrs.get(key, 1.0) != 1.0 for key in ("alpha", "beta")) or node.attrs.get("transA", 0):
        raise FormError("the router's Gemm scales or transposes", node)
    transposes = 1 if _lies_by_expert(node) else 0
    tensor = source(node.inputs[1], UNTOUCHED)
    while (turn := produced_by(tensor, "Transpose")) is not None:
        tensor, transposes = source(turn.inputs[0], UNTOUCHED), transposes + 1
    if not isinstance(tensor, gs.Constant) or len(tensor.shape) != 2:
        raise FormError("the router's weight is no constant matrix", node)
    weight = weights.of(tensor)
    if transposes % 2 == 0:  # stored (H, E)
        weight = weight.map(weight.shape[::-1], np.transpose).cached()
    return weight, block_scope(tensor.name)


def _lies_by_expert(node: gs.Node) -> bool:
    """Whether the matrix that ``node`` reads is (E, H)."""
    if node.op != "Einsum":
        return bool(node.attrs.get("transB", 0))
    left, _, result = node.attrs["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    hidden, kernel = terms if len(terms) == 2 and all(terms) else ("", "")
    expert, channel = (*kernel,) if len(kernel) == len(set(kernel)) == 2 else ("", "")
    for is_by_expert, row, column in ((True, expert, channel), (False, channel, expert)):
        if row and column == hidden[-1] and result == hidden[:-1] + row:
            return is_by_expert
    raise FormError("the router's Einsum is no projection", node)
