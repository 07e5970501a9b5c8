"""Adding nodes to a graph without the noise: fresh names, constants on the way."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.weights import Weight, constant, from_array

BOOL = onnx.TensorProto.BOOL
FLOAT = onnx.TensorProto.FLOAT
INT64 = onnx.TensorProto.INT64


class Emitter:
    """Emits nodes into ``graph``, every name starting with ``scope``."""

    def __init__(self, graph: gs.Graph, scope: str) -> None:
        self._graph = graph
        self._scope = scope
        self._taken = {tensor.name for node in graph.nodes for tensor in (*node.inputs, *node.outputs)}
        self._taken |= {node.name for node in graph.nodes}

    def fresh(self, label: str) -> str:
        """A name that no tensor and no node has yet."""
        name, number = f"{self._scope}/{label}", 1
        while name in self._taken:
            number += 1
            name = f"{self._scope}/{label}_{number}"
        self._taken.add(name)
        return name

    def emit(self, op: str, *inputs: gs.Tensor, label: str, outputs: int = 1, **attributes: Any) -> Any:
        """One node; its output, or the list of its outputs where ``outputs`` is not 1."""
        names = [self.fresh(label if outputs == 1 else f"{label}_{index}") for index in range(outputs)]
        results = [gs.Variable(name) for name in names]
        node = gs.Node(op, name=names[0], attrs=attributes, inputs=list(inputs), outputs=results)
        self._graph.nodes.append(node)
        return results[0] if outputs == 1 else results

    def ints(self, *values: int) -> gs.Constant:
        """An int64 constant of rank 1: axes, shapes."""
        return self.array("ints", np.asarray(values, np.int64))

    def array(self, label: str, values: Any) -> gs.Constant:
        """A small constant."""
        return gs.Constant(self.fresh(label), np.asarray(values))

    def weight(self, label: str, weight: Weight) -> gs.Constant:
        """A constant that stays on disk until the graph is saved."""
        return constant(self.fresh(label), weight)

    def number(self, value: float, like: Weight) -> gs.Constant:
        """A scalar of ``like``'s dtype."""
        return constant(self.fresh("number"), from_array(np.asarray(value, like.dtype)))

    def reshape(self, tensor: gs.Tensor, shape: Sequence[int], label: str) -> gs.Variable:
        """``tensor`` in ``shape``; one entry may be -1."""
        return self.emit("Reshape", tensor, self.ints(*shape), label=label)
