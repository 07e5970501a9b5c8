"""Read what happens to a router's weights after the choice: scaled, renormalised, in any order."""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, operand, produced_by, producer, source
from graph_passes.record.block import FormError
from graph_passes.routers.constants import constant_value, numbers, split_number

SPREAD = SHAPE_ONLY | {"Expand"}
"""Ops that a sum may pass before it divides what was summed."""


@dataclasses.dataclass(frozen=True)
class Finish:
    """``scale * a / (sum(a) + eps)``, or ``/ max(sum(a), eps)`` where ``eps_clips``; only ``scale * a`` as it stands.

    Attributes:
        renormalize: whether the weights are divided by their sum.
    """

    scale: float = 1.0
    renormalize: bool = False
    eps: float = 0.0
    eps_clips: bool = False

    def after(self, earlier: "Finish", node: gs.Node | None) -> "Finish":
        """``earlier`` first, then this.

        Raises:
            FormError: both divide, and the first with an eps.
        """
        if not self.renormalize:
            return dataclasses.replace(earlier, scale=earlier.scale * self.scale)
        if (earlier.renormalize and earlier.eps) or not earlier.scale:
            raise FormError("the weights are renormalised twice, or all are 0", node)
        return dataclasses.replace(self, eps=self.eps / earlier.scale)  # c a / (c sum + eps) = a / (sum + eps / c)


AS_IT_STANDS = Finish()


def read_finish(weights: gs.Tensor) -> tuple[gs.Tensor, Finish]:
    """``weights`` before they were scaled and renormalised; and how they were.

    Raises:
        FormError: they are divided by something else than a constant or their sum.
    """
    tensor, finish = source(weights), AS_IT_STANDS
    while (step := _step(tensor)) is not None:
        node = producer(tensor)
        tensor, finish = source(step[0]), finish.after(step[1], node)
    return tensor, finish


def _step(tensor: gs.Tensor) -> tuple[gs.Tensor, Finish] | None:
    node = produced_by(tensor, "Mul", "Div")
    if node is None:
        return None
    if node.op == "Mul":
        parts = split_number(node)
        return None if parts is None else (parts[0], Finish(scale=parts[1]))
    divisor = constant_value(node.inputs[1])
    if divisor:
        return node.inputs[0], Finish(scale=1.0 / divisor)
    numerator = source(node.inputs[0])
    total, eps, clips = strip_eps(node.inputs[1])
    summed = produced_by(total, "ReduceSum", "ReduceL1")
    if summed is None or source(summed.inputs[0]) is not numerator or not over_later_axis(summed):
        raise FormError("the weights are divided by something else than their sum", node)
    return numerator, Finish(renormalize=True, eps=eps, eps_clips=clips)


def strip_eps(total: gs.Tensor) -> tuple[gs.Tensor, float, bool]:
    """(sum, eps, whether eps is its lower bound) of ``sum + eps``, ``Clip(sum, eps)`` or ``Max(sum, eps)``."""
    total = source(total, SPREAD)
    node = produced_by(total, "Add", "Max", "Clip")
    if node is None:
        return total, 0.0, False
    if node.op == "Clip":
        low = constant_value(operand(node, 1))
        if low is None or operand(node, 2) is not None:
            return total, 0.0, False
        return source(node.inputs[0], SPREAD), low, True
    parts = split_number(node) if len(node.inputs) == 2 else None
    return (total, 0.0, False) if parts is None else (source(parts[0], SPREAD), parts[1], node.op == "Max")


def over_later_axis(reduction: gs.Node) -> bool:
    """Whether a reduction leaves the first axis alone and reduces one axis: the experts or slots of a token."""
    given = numbers(operand(reduction, 1)) or list(reduction.attrs.get("axes", []))
    return len(given) == 1 and given[0] != 0
