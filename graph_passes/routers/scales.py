"""Read a factor that every expert has of its own, which multiplies its weight at the end (Gemma 4).

::

    weights (T, K) * Gather(scales (E,), ids)
    gates (T, E) * scales (1, E)                as our own writer has it where nothing is ranked
"""

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, source

Scaled = tuple[gs.Tensor, gs.Constant | None]


def strip_scales(ids: gs.Tensor, weights: gs.Tensor) -> Scaled:
    """(``weights`` before they were multiplied by a factor of each one's expert, the factors); None for no such."""
    product = produced_by(source(weights), "Mul")
    for this, other in () if product is None else (product.inputs, reversed(product.inputs)):
        looked_up = produced_by(source(other), "Gather", "GatherND")
        if looked_up is None or source(looked_up.inputs[1]) is not source(ids):
            continue
        table = looked_up.inputs[0]
        plain = not looked_up.attrs.get("axis", 0) and not looked_up.attrs.get("batch_dims", 0)
        if plain and isinstance(table, gs.Constant) and len(table.shape) == 1:
            return this, table
    return weights, None


def is_scaled(product: gs.Node) -> bool:
    """Whether ``product`` multiplies something by numbers that are looked up by ids, rather than by a mask."""
    looked_up = (produced_by(source(tensor), "Gather", "GatherND") for tensor in product.inputs)
    tables = (node.inputs[0] for node in looked_up if node is not None)
    return any(isinstance(table, gs.Constant) and len(table.shape) == 1 for table in tables)


def strip_row(gates: gs.Tensor) -> Scaled:
    """(``gates`` before each column was multiplied by a factor of its own, the factors); None for no such."""
    product = produced_by(source(gates), "Mul")
    for this, other in () if product is None else (product.inputs, reversed(product.inputs)):
        row = source(other)
        if isinstance(row, gs.Constant) and len(row.shape) == 2 and row.shape[0] == 1 < row.shape[1]:
            return this, row
    return gates, None
