"""Runs the part of a graph that moves tokens about, on values that a reader chose.

Exporters spell one gather in a dozen ways. What a spelling does is found out by doing it: a reader gives ids, weights
and hidden states, and sees which of them arrive where. Nothing of a projection is run, so this costs next to nothing.
"""

import math
from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import is_weight, producer
from graph_passes.readers.trial.kernels import KERNELS, MOST_ENTRIES, Inputs, widened
from graph_passes.record.block import FormError
from graph_passes.routers import Weights
from graph_passes.weights.weight import Array

SAME_SHAPE = frozenset(
    {"Add", "Cast", "Div", "Identity", "LayerNormalization", "Mul", "RMSNormalization", "Sub"}
    | {"SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
"""Ops between layers whose result has the shape of their first computed input."""


class Interpreter:
    """Computes values from those that are given; what nothing is going to read again is forgotten.

    Where the shape of something else is asked for, such as that of a graph's input, there are ``tokens`` tokens: one
    sequence of them.
    """

    def __init__(self, weights: Weights, tokens: int) -> None:
        self._weights, self._tokens = weights, tokens
        self._values: dict[int, Array] = {}
        self._given: set[int] = set()
        self._uses: Counter[int] = Counter()

    def give(self, tensor: gs.Tensor, value: Array) -> None:
        """Let ``tensor`` be ``value``, however the graph computes it."""
        self._values[id(tensor)] = value
        self._given.add(id(tensor))

    def of(self, tensor: gs.Tensor) -> Array:
        """The value of ``tensor``.

        Raises:
            FormError: it depends on an op that moves no tokens, or on an input that was not given.
        """
        waiting = [tensor]
        while waiting:
            current = waiting[-1]
            if id(current) in self._values:
                waiting.pop()
                continue
            node = producer(current)
            if node is None:
                self._values[id(current)] = self._constant(current)
                continue
            if node.op not in KERNELS:
                raise FormError(f"{node.op} is no op that picks, sorts or returns tokens", node)
            missing = [item for item in node.inputs if not item.is_empty() and id(item) not in self._values]
            if missing and node.op == "Shape":
                self._run(node, [self._shaped(missing[0])])
            elif missing:
                waiting.extend(missing)
            else:
                self._run(node, [None if item.is_empty() else self._values[id(item)] for item in node.inputs])
        return self._values[id(tensor)]

    def _shaped(self, tensor: gs.Tensor) -> Array:
        """Something of the shape of ``tensor``: its value where it can be computed."""
        try:
            return self.of(tensor)
        except FormError:
            dims = dims_of(tensor)
            if dims is None:
                raise
        dynamic = [axis for axis, size in enumerate(dims) if not isinstance(size, int)]
        sizes = [size if isinstance(size, int) else 1 for size in dims]
        for axis in dynamic[-1:]:
            sizes[axis] = self._tokens
        return np.broadcast_to(np.float64(0), sizes)

    def _constant(self, tensor: gs.Tensor) -> Array:
        if not isinstance(tensor, gs.Constant):
            raise FormError("where tokens go depends on something else than the router", tensor)
        weight = self._weights.of(tensor)
        if weight.dtype.kind in "OSUc":
            raise FormError(f"where tokens go depends on a constant of type {weight.dtype.name}", tensor)
        if math.prod(weight.shape) > MOST_ENTRIES:
            raise FormError("where tokens go depends on a large constant", tensor)
        return widened(weight.load())

    def _run(self, node: gs.Node, inputs: Inputs) -> None:
        try:
            with np.errstate(all="ignore"):  # weights may be anything; what comes of them is looked at
                result = KERNELS[node.op](node, inputs)
        except (ValueError, IndexError, TypeError, MemoryError) as error:
            raise FormError(f"{node.op} does not fit the tokens that it gets: {error}", node) from error
        results = result if isinstance(result, list) else [result]
        for output, value in zip(node.outputs, results, strict=False):
            if id(output) not in self._given:
                self._values[id(output)] = value
        self._forget(node)

    def _forget(self, node: gs.Node) -> None:
        for item in node.inputs:
            self._uses[id(item)] += 1
            if self._uses[id(item)] == len(item.outputs) and id(item) not in self._given:
                self._values.pop(id(item), None)


def dims_of(tensor: gs.Tensor, *, embedded: bool = False) -> list[int | str | None] | None:
    """The axes of ``tensor``: as the graph states them, or those of what it is computed from entry by entry."""
    while tensor.shape is None:
        node = producer(tensor)
        values = [] if node is None else [value for value in node.inputs if isinstance(value, gs.Variable)]
        if node is None or not values:
            return None
        if node.op == "Gather" and is_weight(node.inputs[0], 2) and not embedded:  # an embedding of ids
            ids = dims_of(node.inputs[1], embedded=True)
            return None if ids is None else [*ids, node.inputs[0].shape[1]]
        if node.op not in SAME_SHAPE:
            return None
        tensor = values[0]
    return list(tensor.shape)


def tokens_of(hidden_TH: gs.Tensor) -> int | None:
    """T where a graph has a fixed number of tokens."""
    dims = dims_of(hidden_TH)
    return dims[0] if dims is not None and isinstance(dims[0], int) else None
