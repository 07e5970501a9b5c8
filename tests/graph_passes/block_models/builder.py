"""Collects the nodes and constants of one graph or function, naming and sharing them as exporters do."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.graph_passes.block_models.spec import Spec

MICROSOFT = "com.microsoft"

Operand = str | np.ndarray | np.generic | Sequence[int] | None
"""A value by name; a constant by its numbers, plain integers being int64; or an input left out."""

ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


class Builder:
    """A graph, or the body of a function, which takes its weights as inputs and has no initialisers.

    Attributes:
        nodes: in the order in which they were asked for.
        initializers: by name. Equal small constants are one initialiser, however many nodes read them.
        outputs: values besides the last that the graph gives.
        weights: what was asked for with `weight`, by the name that was asked for.
        formals: what they are called here, in the same order.
    """

    def __init__(self, spec: Spec, *, is_function: bool = False) -> None:
        self.spec = spec
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, np.ndarray] = {}
        self._is_function = is_function
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._written: dict[bytes, list[str]] = {}
        self._renamed: dict[str, str] = {}
        self._taken: Counter[str] = Counter()

    @property
    def formals(self) -> list[str]:
        return list(self._renamed.values())

    @property
    def element_type(self) -> int:
        """Of the model's activations."""
        return ELEMENT_TYPES[self.spec.dtype]

    def op(self, op_type: str, *operands: Operand, out: str = "", domain: str = "", **attributes: Any) -> str:
        """The only output of a new node."""
        return self.ops(op_type, *operands, out=(out or op_type.lower(),), domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *operands: Operand, out: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """The outputs of a new node, named like ``out``, with a number where that is taken.

        A node that is there already is not written again: exporters' optimisers eliminate common subexpressions.
        """
        inputs = [self._input(operand) for operand in operands]
        node = helper.make_node(op_type, inputs, [], domain=domain, **attributes)
        key = node.SerializeToString(deterministic=True)
        if key in self._written and not self.spec.unoptimised:
            return self._written[key]
        self._written[key] = [self.fresh(name) for name in out]
        node.output[:] = self._written[key]
        self.nodes.append(node)
        return self._written[key]

    def constant(self, value: np.ndarray | np.generic | Sequence[int]) -> str:
        """A small constant."""
        array = np.asarray(value)
        if self._is_function or self.spec.constants_as_nodes or self.spec.unoptimised:
            return self.op("Constant", out="val", value=numpy_helper.from_array(array))
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._store(self.fresh("val"), array)
        return self._constants[key]

    def weight(self, name: str, array: np.ndarray) -> str:
        """A parameter; asked for twice, it is there once."""
        if name not in self._renamed:
            self._renamed[name] = self.fresh(name if self.spec.named else "val")
            self.weights[name] = array
            if not self._is_function:
                self._store(self._renamed[name], array)
        return self._renamed[name]

    def scalar(self, value: float, element_type: int = TensorProto.FLOAT) -> np.ndarray:
        """``value`` () as a constant of the given type."""
        return np.asarray(value, helper.tensor_dtype_to_np_dtype(element_type))

    def rename(self, value: str, name: str) -> None:
        """Let the output ``value`` be called ``name`` everywhere."""
        for node in self.nodes:
            node.input[:] = [name if one == value else one for one in node.input]
            node.output[:] = [name if one == value else one for one in node.output]

    def fresh(self, name: str) -> str:
        """``name``, or ``name_1`` ... where it is taken."""
        self._taken[name] += 1
        return name if self._taken[name] == 1 else self.fresh(f"{name}_{self._taken[name] - 1}")

    def _input(self, operand: Operand) -> str:
        if operand is None:
            return ""
        return operand if isinstance(operand, str) else self.constant(operand)

    def _store(self, name: str, array: np.ndarray) -> str:
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        return name
