"""Adding nodes to a graph without the noise: fresh names, constants on the way."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph.dequantize import dequantization
from graph_passes.graph.walk import every_node
from graph_passes.weights.stored import constant
from graph_passes.weights.weight import Weight, from_array

BOOL = onnx.TensorProto.BOOL
FLOAT = onnx.TensorProto.FLOAT
INT64 = onnx.TensorProto.INT64


class Names:
    """The names that tensors and nodes of a graph and its bodies have; collected once, because graphs are large."""

    def __init__(self, graph: gs.Graph) -> None:
        self._taken = {tensor.name for node in every_node(graph) for tensor in (*node.inputs, *node.outputs)}
        self._taken |= {node.name for node in every_node(graph)}
        self._numbers: dict[str, int] = {}

    def fresh(self, wanted: str) -> str:
        """``wanted``, numbered where another has it already."""
        name = wanted
        while name in self._taken:
            self._numbers[wanted] = self._numbers.get(wanted, 1) + 1
            name = f"{wanted}_{self._numbers[wanted]}"
        self._taken.add(name)
        return name


class Emitter:
    """Emits nodes into ``graph``, every name starting with ``scope``; ``names`` are those that the graph has."""

    def __init__(self, graph: gs.Graph, scope: str, names: Names) -> None:
        self._graph = graph
        self._scope = scope
        self._names = names

    @property
    def opset(self) -> int:
        """Version of the standard operators in this graph."""
        return int(self._graph.opset)

    def within(self, part: str) -> "Emitter":
        """An emitter into the same graph, one scope further in."""
        return Emitter(self._graph, f"{self._scope}/{part}", self._names)

    def fresh(self, label: str) -> str:
        """A name that no tensor and no node has yet."""
        return self._names.fresh(f"{self._scope}/{label}")

    def emit(self, op: str, *inputs: gs.Tensor, label: str, outputs: int = 1, **attributes: Any) -> Any:
        """One node; its output, or the list of its outputs where ``outputs`` is not 1."""
        names = [self.fresh(label if outputs == 1 else f"{label}_{index}") for index in range(outputs)]
        results = [gs.Variable(name) for name in names]
        node = gs.Node(op, name=names[0], attrs=attributes, inputs=list(inputs), outputs=results)
        self._graph.nodes.append(node)
        return results[0] if outputs == 1 else results

    def fused(self, domain: str, op: str, *inputs: gs.Tensor, label: str, **attributes: Any) -> gs.Variable:
        """One node of another domain than ONNX's own, and its only output."""
        result: gs.Variable = self.emit(op, *inputs, label=label, **attributes)
        result.inputs[0].domain = domain
        return result

    def ints(self, *values: int) -> gs.Constant:
        """An int64 constant of rank 1: axes, shapes."""
        return self.array("ints", np.asarray(values, np.int64))

    def array(self, label: str, values: Any) -> gs.Constant:
        """A small constant."""
        return gs.Constant(self.fresh(label), np.asarray(values))

    def weight(self, label: str, weight: Weight) -> gs.Tensor:
        """A constant that stays on disk until the graph is saved; what dequantises it, where it is quantised.

        Raises:
            UserError: no standard op of this opset dequantises it.
        """
        if weight.scales is None:
            return self.stored(label, weight)
        parts = dequantization(weight, self.opset, f"weight {label} of layer {self._scope}")
        inputs = [self.stored(label, parts.values), self.weight(f"{label}_scale", parts.scales)]
        if parts.zero_points is not None:
            inputs.append(self.stored(f"{label}_zero_point", parts.zero_points))
        dequantized: gs.Variable = self.emit("DequantizeLinear", *inputs, label=f"{label}_float", **parts.attributes)
        if weight.cast_to is None:
            return dequantized
        to = onnx.helper.np_dtype_to_tensor_dtype(weight.cast_to)
        return self.emit("Cast", dequantized, label=f"{label}_cast", to=to)

    def stored(self, label: str, weight: Weight) -> gs.Constant:
        """A constant that stays on disk until the graph is saved, of a weight without scales."""
        return constant(self.fresh(label), weight)

    def number(self, value: float, like: Weight) -> gs.Constant:
        """A scalar of the dtype that ``like`` is computed with."""
        return constant(self.fresh("number"), from_array(np.asarray(value, like.float_dtype)))

    def reshape(self, tensor: gs.Tensor, shape: Sequence[int], label: str) -> gs.Variable:
        """``tensor`` in ``shape``; one entry may be -1."""
        return self.emit("Reshape", tensor, self.ints(*shape), label=label)
