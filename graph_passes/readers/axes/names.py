"""The names of axes: an axis is a tuple of them, the slowest first.

``("T",)`` tokens, ``("E",)`` experts, ``("E", "F")`` the channels of all experts side by side, ``()`` length 1.
"""

from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from graph_passes.record.block import FormError

Axis = tuple[str, ...]
Axes = tuple[Axis, ...]

ONE: Axis = ()
TOKENS: Axis = ("T",)
EXPERTS: Axis = ("E",)
HIDDEN: Axis = ("H",)
WIDTH: Axis = ("F",)
SLOTS: Axis = ("K",)

ELEMENTWISE = frozenset(
    {"Add", "Cast", "CastLike", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity"}
    | {"LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish"}
    | {"Tanh", "Where"}
)
"""Ops that treat every entry alike."""

PARTS = frozenset({"SequenceAt", "Slice", "Split", "SplitToSequence"})
"""Ops that part gate from up."""


def text(axes: Iterable[Axis]) -> str:
    """Axes as people write them.

    >>> text((("T",), (), ("E", "F")))
    '(T, 1, E*F)'
    """
    return f"({', '.join('*'.join(axis) or '1' for axis in axes)})"


def joined(node: gs.Node, shapes: Sequence[Axes]) -> Axes:
    """What shapes broadcast to.

    Raises:
        FormError: they do not.
    """
    rank = max((len(axes) for axes in shapes), default=0)
    result: list[Axis] = [ONE] * rank
    for axes in shapes:
        for index, axis in enumerate(axes, start=rank - len(axes)):
            result[index] = same(node, result[index], axis)
    return tuple(result)


def same(node: gs.Node, one: Axis, other: Axis) -> Axis:
    """What two axes broadcast to.

    Raises:
        FormError: they are different, and neither has length 1.
    """
    if ONE not in (one, other) and one != other:
        raise FormError(f"{node.op} lets the axis {text([one])} meet {text([other])}", node)
    return other if one == ONE else one
