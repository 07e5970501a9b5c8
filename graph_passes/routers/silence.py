"""Read which rows of a router lead to no expert, because their gates are dropped behind the choice.

::

    gates (T, E) * [0, 1, 0 ...]        what an expert would have got goes nowhere
    Gather(gates, [1, 5], axis=1)       the same, as form ``dense`` writes it
"""

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.walk import produced_by, source


def strip_silence(gates: gs.Tensor) -> tuple[gs.Tensor, tuple[int, ...] | None]:
    """(gates (T, E) of all rows, the rows that lead to an expert); None for all."""
    node = produced_by(source(gates), "Mul", "Gather")
    if node is None:
        return gates, None
    if node.op == "Gather":
        ids = node.inputs[1]
        picked = isinstance(ids, gs.Constant) and len(ids.shape) == 1 and node.attrs.get("axis", 0) in (1, -1)
        return (node.inputs[0], tuple(map(int, ids.values))) if picked else (gates, None)
    for this, other in (node.inputs, reversed(node.inputs)):
        if (
            isinstance(other, gs.Constant)
            and len(other.shape)
            and other.shape[-1] == np.prod(other.shape, dtype=int) > 1
        ):
            values = np.ravel(other.values)
            if np.isin(values, (0, 1)).all() and not values.all() and values.any():
                return this, tuple(map(int, np.flatnonzero(values)))
    return gates, None
