"""Read a 0/1 mask over the experts: which ids it marks.

::

    OneHot(ids, E, [0, 1])
    Equal(Unsqueeze(ids), [0 ... E-1])
    ScatterElements(zeros, ids, ones)

(T, K, E), or (T, E) where the slots were added up or there is one. Casts and reshapes are stepped over.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, source
from graph_passes.routers.constants import constant_value


def ids_of(mask: gs.Tensor) -> gs.Tensor | None:
    """The ids that ``mask`` marks with 1; None where it is no such mask."""
    node = producer(source(mask))
    if node is not None and node.op in ("ReduceSum", "ReduceMax"):
        node = producer(source(node.inputs[0]))
    if node is None:
        return None
    if node.op == "OneHot":
        values = node.inputs[2]
        plain = isinstance(values, gs.Constant) and values.values.reshape(-1).tolist() == [0, 1]
        return source(node.inputs[0]) if plain and node.attrs.get("axis", -1) != 0 else None
    if node.op == "Equal":
        return _compared(node)
    if node.op == "ScatterElements":
        return scattered_ids(node) if constant_value(node.inputs[2]) == 1.0 else None
    return None


def _compared(equal: gs.Node) -> gs.Tensor | None:
    for this, other in ((0, 1), (1, 0)):
        if is_counting(source(equal.inputs[other])) and not isinstance(equal.inputs[this], gs.Constant):
            return source(equal.inputs[this])
    return None


def is_counting(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is 0, 1, 2 ... as a constant or a Range."""
    node = produced_by(tensor, "Range")
    if node is not None:
        start, _, step = (constant_value(value) for value in node.inputs)
        return (start, step) == (0.0, 1.0)
    if not isinstance(tensor, gs.Constant):
        return False
    values = tensor.values.reshape(-1)
    return bool(np.array_equal(values, np.arange(len(values))))


def scattered_ids(scatter: gs.Node, base: float = 0.0) -> gs.Tensor | None:
    """The ids of a ScatterElements over the last axis of what is ``base`` everywhere."""
    overwrites = scatter.attrs.get("reduction", "none") in ("none", b"none") or base == 0.0
    along = scatter.attrs.get("axis", 0) != 0 and overwrites and constant_value(scatter.inputs[0]) == base
    return source(scatter.inputs[1]) if along else None
