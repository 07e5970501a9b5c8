"""Read which rows of a router lead to no expert, because their gates are dropped behind the choice.

::

    gates (T, E) * [0, 1, 0 ...]        what an expert would have got goes nowhere
    Gather(gates, [1, 5], axis=1)       the same, as form ``dense`` writes it
    Gather([2, 0, 2, 2, 2, 1, 2, 2], ids) beside weights * Gather([0, 1, 0, 0, 0, 1, 0, 0], ids)
                                        the same of slots, as ``sorted`` and ``gather`` write it
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.walk import produced_by, source
from graph_passes.weights import Array


@dataclasses.dataclass(frozen=True)
class Led:
    """Ids and weights (T, K) of all rows of a router, and the rows that lead to an expert; None for all."""

    ids: gs.Tensor
    weights: gs.Tensor
    leads_to: tuple[int, ...] | None = None


def strip_led(ids: gs.Tensor, weights: gs.Tensor) -> Led:
    """What ``ids`` of experts and ``weights`` were made of, where some rows lead to no expert."""
    expert_of, product = produced_by(source(ids), "Gather"), produced_by(source(weights), "Mul")
    if expert_of is None or product is None:
        return Led(ids, weights)
    rows, table = expert_of.inputs[1], _table(expert_of)
    for every_weight, other in (product.inputs, reversed(product.inputs)):
        leads = produced_by(source(other), "Gather")
        kept = None if leads is None or source(leads.inputs[1]) is not source(rows) else _table(leads)
        if table is None or kept is None or len(kept) != len(table) or not np.isin(kept, (0, 1)).all():
            continue
        leads_to = np.flatnonzero(kept)
        if len(leads_to) and np.array_equal(table[leads_to], np.arange(len(leads_to))):
            return Led(rows, every_weight, tuple(map(int, leads_to)))
    return Led(ids, weights)


def _table(gather: gs.Node) -> Array | None:
    """What ``gather`` looks up in a constant for each row of a router."""
    table = gather.inputs[0]
    is_table = isinstance(table, gs.Constant) and len(table.shape) == 1 and gather.attrs.get("axis", 0) == 0
    return np.asarray(table.values) if is_table else None


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
