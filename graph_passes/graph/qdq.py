"""QuantizeLinear and DequantizeLinear in a row: values that are rounded on their way, and otherwise what they were."""

import contextlib
from collections.abc import Iterator, Sequence

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by


@contextlib.contextmanager
def bypassed(graph: gs.Graph) -> Iterator[None]:
    """Let whoever reads what a pair rounded read what it was before, meanwhile: readers look at the unrounded graph."""
    moved = []
    for node in graph.nodes:
        first = produced_by(node.inputs[0], "QuantizeLinear") if node.op == "DequantizeLinear" else None
        if first is None:
            continue
        rounded, before = node.outputs[0], first.inputs[0]
        for reader in list(rounded.outputs):
            for index, tensor in enumerate(reader.inputs):
                if tensor is rounded:
                    reader.inputs[index] = before
                    moved.append((reader, index, rounded))
    try:
        yield
    finally:
        for reader, index, rounded in moved:
            reader.inputs[index] = rounded


def rounds(nodes: Sequence[gs.Node]) -> bool:
    """Whether one of ``nodes`` rounds what it reads."""
    return any(node.op == "QuantizeLinear" for node in nodes)
