"""Follow the outputs of all experts forward, through their gates, to the one sum that is the block's output."""

import dataclasses
from collections.abc import Callable, Iterator

import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, producer, source
from graph_passes.readers.axes.axis_reader import AxisReader
from graph_passes.readers.axes.names import EXPERTS, HIDDEN, ONE, SLOTS, TOKENS
from graph_passes.record.block import FormError, Router
from graph_passes.routers import Weights, read_gates, read_slots
from graph_passes.routers.hits import is_counting
from graph_passes.weights.weight import Weight

MOVES = SHAPE_ONLY | {"Expand", "Transpose"}
"""Ops that only put values elsewhere, or repeat them."""


@dataclasses.dataclass(frozen=True)
class Weighing:
    """What happens to the outputs of all experts.

    Attributes:
        gates: what multiplies them; None where nothing did.
        ids: by which those of K experts were picked before; None where all were taken.
        bias: what was added to them; None where nothing was.
        sums: their sum over the experts, and what it is moved to afterwards; empty where they are not summed.
    """

    gates: gs.Tensor | None
    ids: gs.Tensor | None
    bias: gs.Tensor | None
    sums: tuple[gs.Tensor, ...]


def follow(outputs: gs.Tensor, gates: gs.Tensor | None, is_bias: Callable[[gs.Tensor], bool]) -> Weighing:
    """Where ``outputs`` of all experts go; ``gates`` where they were multiplied before.

    Where ``outputs`` are summed already, ``follow`` finds their bias, and what they are moved to.
    """
    bias, ids, summed, sums = None, None, False, [outputs]
    for node, other in _path(outputs):
        if node.op in MOVES:
            sums.append(node.outputs[0])
        elif node.op == "Add" and bias is None and other is not None and is_bias(other):
            bias, sums = other, [node.outputs[0]]
        elif summed:
            break
        elif node.op == "GatherElements" and gates is None and other is node.inputs[1]:
            ids = other
        elif node.op == "Mul" and gates is None and other is not None:
            gates = other
        elif node.op == "ReduceSum":
            summed, sums = True, [node.outputs[0]]
        elif node.op in ("Einsum", "MatMul") and gates is None and other is not None:
            gates, summed, sums = other, True, [node.outputs[0]]
        else:
            break
    return Weighing(gates, ids, bias, tuple(sums))


def _path(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, gs.Tensor | None]]:
    """The only consumer of ``tensor``, that one's, and so on; each with its other operand, where it has two.

    Who asks for a shape only is not counted.
    """
    while len(consumers := [node for node in tensor.outputs if node.op != "Shape"]) == 1:
        node = consumers[0]
        others = [operand for operand in node.inputs if operand is not tensor]
        yield node, others[0] if len(others) == len(node.inputs) - 1 == 1 else None
        tensor = node.outputs[0]


def route(gates: gs.Tensor, ids: gs.Tensor | None, axes: AxisReader, weights: Weights) -> Router:
    """The router behind ``gates``, which are (T, E), or (T, K) beside ``ids``, before they are moved to their place.

    Raises:
        FormError: they are none of a known router.
    """
    base = source(gates, MOVES - {"Squeeze"})
    if ids is None:
        axes.know(base, TOKENS, EXPERTS)
        return read_gates(base, weights)
    ids = source(ids, MOVES - {"Squeeze"})
    all_in_order = isinstance(ids, gs.Constant) and is_counting(ids)  # nothing is ranked
    axes.know(base, TOKENS, SLOTS)
    axes.know(ids, ONE if all_in_order else TOKENS, SLOTS)
    router = read_gates(base, weights) if all_in_order else read_slots(ids, base, weights)
    axes.size(SLOTS, router.slot_count)
    return router


def sum_of(weighing: Weighing, axes: AxisReader, weight: Weight) -> gs.Tensor:
    """The (T, H) value among ``weighing.sums``, in the dtype of the experts' ``weight`` where it is cast to that.

    Raises:
        FormError: none has these axes.
    """
    for tensor in weighing.sums:
        if axes.of(tensor) == (TOKENS, HIDDEN):
            return in_dtype_of(weight, tensor)
    last = weighing.sums[-1]
    axes.expect(last, TOKENS, HIDDEN)
    raise FormError("the experts' outputs are not summed", producer(last) or last)


def check_tokens(tokens: gs.Tensor) -> None:
    """Refuse tokens that are known not to be (T, H).

    Raises:
        FormError: with the number of axes.
    """
    if tokens.shape is not None and len(tokens.shape) != 2:
        rank = len(tokens.shape)
        raise FormError(
            f"the experts read tokens in {rank} axes, expected (tokens, channels)", producer(tokens) or tokens
        )


def in_dtype_of(weight: Weight, tensor: gs.Tensor) -> gs.Tensor:
    """``tensor``; or what it is cast to, where nothing else reads it and ``weight`` is computed with that dtype."""
    cast = tensor.outputs[0] if len(tensor.outputs) == 1 else None
    if cast is None or cast.op != "Cast":
        return tensor
    to = onnx.helper.tensor_dtype_to_np_dtype(int(cast.attrs["to"]))
    return cast.outputs[0] if to == weight.float_dtype else tensor
