"""Read which rows of a router lead to which expert, where their gates are dropped or added up behind the choice.

::

    gates (T, E) * [0, 1, 0 ...]        what an expert would have got goes nowhere
    Gather(gates, [1, 5], axis=1)       the same, as form ``dense`` writes it
    MatMul(gates, [[1, 0], [0, 1], [1, 0]])   rows that share an expert
    Gather([2, 0, 2, 2, 2, 1, 2, 2], ids) beside weights * Gather([0, 1, 0, 0, 0, 1, 0, 0], ids)
                                        the same of slots, as ``sorted`` and ``gather`` write it
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import is_weight, produced_by, source
from graph_passes.weights.weight import Array

Aliases = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Led:
    """Ids and weights (T, K) of all rows of a router, and the rows that lead to an expert; None for all.

    Attributes:
        aliases: (row, other) where a row leads to the expert of another, one of ``leads_to``.
    """

    ids: gs.Tensor
    weights: gs.Tensor
    leads_to: tuple[int, ...] | None = None
    aliases: Aliases = ()


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
        found = _leading(np.where(kept, table, -1))
        if found is not None:
            return Led(rows, every_weight, *found)
    return Led(ids, weights)


def _leading(expert_of: Array) -> tuple[tuple[int, ...], Aliases] | None:
    """(for each expert the first row that leads to it, the other rows); None where some expert has no row.

    >>> _leading(np.array([1, -1, 0, 1]))
    ((2, 0), ((3, 0),))
    """
    rows = [np.flatnonzero(expert_of == expert).tolist() for expert in range(int(expert_of.max(initial=-1)) + 1)]
    if not rows or not all(rows) or expert_of.min() < -1:
        return None
    return tuple(first for first, *_ in rows), tuple((row, first) for first, *others in rows for row in others)


def _table(gather: gs.Node) -> Array | None:
    """What ``gather`` looks up in a constant for each row of a router."""
    table = gather.inputs[0]
    is_table = isinstance(table, gs.Constant) and len(table.shape) == 1 and gather.attrs.get("axis", 0) == 0
    return np.asarray(table.values) if is_table else None


def strip_aliases(gates: gs.Tensor) -> tuple[gs.Tensor, tuple[int, ...], Aliases] | None:
    """(gates (T, E) of all rows, for each expert a row that leads to it, the rows that share it); None for no such."""
    node = produced_by(source(gates), "MatMul")
    if node is None or not is_weight(node.inputs[1], 2) or node.inputs[1].shape[0] <= node.inputs[1].shape[1]:
        return None
    table = np.asarray(node.inputs[1].values)
    if not np.isin(table, (0, 1)).all() or (table.sum(axis=1) > 1).any():
        return None
    found = _leading(np.where(table.any(axis=1), table.argmax(axis=1), -1))
    return None if found is None or len(found[0]) != table.shape[1] else (node.inputs[0], *found)


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
