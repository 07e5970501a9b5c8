"""A graph in float64: what one of float32 would compute without its rounding."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.model_file import load_graph, save_graph
from graph_passes.stored import LazyWeight, of_constant
from graph_passes.walk import constants, every_node
from moe_spec.runner import Arrays, Feeds

_SINGLE, _DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE


def save_doubled(source: Path, target: Path) -> None:
    """Write the ONNX file ``source`` with float64 in the place of float32; weights are cast a piece at a time."""
    graph = load_graph(source)
    for tensor in constants(graph):
        weight = of_constant(tensor, source.parent)
        if weight.dtype == np.float32:
            tensor._values = LazyWeight(weight.astype(np.float64))
    for node in every_node(graph):
        node.attrs.update(_doubled(node.attrs))
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.dtype == np.float32:
            tensor.dtype = np.dtype(np.float64)
    save_graph(graph, source.parent, target)


def doubled(feeds: Feeds) -> Arrays:
    """``feeds`` as the doubled graph takes them."""
    return {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in feeds.items()}


def _doubled(attributes: Mapping[str, object]) -> dict[str, object]:
    """What changes: dtypes that nodes cast to or make, and constants that they hold."""
    changed: dict[str, object] = {}
    for name, value in attributes.items():
        if name in ("to", "dtype") and value == _SINGLE:
            changed[name] = _DOUBLE
        elif isinstance(value, gs.Constant) and value.dtype == np.float32:
            changed[name] = gs.Constant(value.name, value.values.astype(np.float64))
    return changed
