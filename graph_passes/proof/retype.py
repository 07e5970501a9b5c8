"""A graph with another float type in the place of one: what would it compute without its rounding?

float64 for float32 tells rounding from faults; float32 for the halves gives the graph that a rounded one stands for,
which runs where there are no kernels for halves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from graph_passes.graph.walk import constants, every_node
from graph_passes.model_file import load_graph, save_graph
from graph_passes.weights.stored import LazyWeight, of_constant
from moe_spec.runner import Arrays, Feeds

Format = np.dtype[Any]
Retyping = Mapping[Format, Format]

SINGLE = np.dtype(np.float32)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

DOUBLED: Retyping = {SINGLE: np.dtype(np.float64)}
WIDENED: Retyping = {np.dtype(np.float16): SINGLE, BFLOAT16: SINGLE}


def save_retyped(source: Path, target: Path, new: Retyping) -> None:
    """Write the ONNX file ``source`` with the types that ``new`` has for its own; weights are cast piece by piece."""
    graph = load_graph(source)
    for tensor in constants(graph):
        weight = of_constant(tensor, source.parent)
        if weight.dtype in new:
            tensor._values = LazyWeight(weight.astype(new[weight.dtype]))
    numbers = {_number(old): _number(type_) for old, type_ in new.items()}
    for node in every_node(graph):
        node.attrs.update(_retyped(node.attrs, numbers, new))
    for tensor in (*graph.inputs, *graph.outputs):
        old = declared(tensor)
        if old is not None and old in new:
            tensor.dtype = new[old]
    save_graph(graph, source.parent, target)


def retyped(feeds: Feeds, new: Retyping) -> Arrays:
    """``feeds`` as the retyped graph takes them."""
    return {name: array.astype(new.get(array.dtype, array.dtype), copy=False) for name, array in feeds.items()}


def declared(tensor: gs.Tensor) -> Format | None:
    """The type of an input or output; graphsurgeon has a number for those that numpy lacks."""
    if isinstance(tensor.dtype, int):
        return onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype)
    return None if tensor.dtype is None else np.dtype(tensor.dtype)


def _number(type_: Format) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(type_))


def _retyped(attributes: Mapping[str, object], numbers: Mapping[int, int], new: Retyping) -> dict[str, object]:
    """What changes: types that nodes cast to or make, and constants that they hold."""
    changed: dict[str, object] = {}
    for name, value in attributes.items():
        if name in ("to", "dtype") and isinstance(value, int) and value in numbers:
            changed[name] = numbers[value]
        elif isinstance(value, gs.Constant) and (old := declared(value)) is not None and old in new:
            values = of_constant(value, Path()).load().astype(new[old])
            changed[name] = gs.Constant(value.name, LazyValues(onnx.numpy_helper.from_array(values)))
    return changed
