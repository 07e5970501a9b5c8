"""The type of every value of a graph, from its inputs and constants onwards: which of them are float32."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

STANDARD = (None, "", "ai.onnx")
FLOAT = onnx.TensorProto.FLOAT

Types = dict[int, int]
"""``TensorProto.DataType`` by the id of a tensor; what cannot be told is missing."""

_BY_ATTRIBUTE: Mapping[str, str] = {
    "Bernoulli": "dtype",
    "Cast": "to",
    "EyeLike": "dtype",
    "Multinomial": "dtype",
    "RandomNormal": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniform": "dtype",
    "RandomUniformLike": "dtype",
}


def infer_types(graph: gs.Graph) -> Types:
    """The types of all values of ``graph`` (in topological order) and of the bodies in it."""
    types: Types = {}
    _infer(graph, int(graph.opset), types)
    return types


def type_of(tensor: gs.Tensor) -> int | None:
    """What a constant, an input or an output says of itself."""
    if tensor.dtype is None:
        return None
    if isinstance(tensor.dtype, int):
        return tensor.dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))


def schema_of(node: gs.Node, opset: int) -> onnx.defs.OpSchema | None:
    """What ONNX says of the op of ``node``; None where it is not ONNX's own."""
    if node.domain not in STANDARD:
        return None
    try:
        return onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError:
        return None


def formal(parameters: Any, index: int) -> onnx.defs.OpSchema.FormalParameter:
    """Parameter ``index``; the last one may stand for many."""
    found: onnx.defs.OpSchema.FormalParameter = parameters[min(index, len(parameters) - 1)]
    return found


def _infer(graph: gs.Graph, opset: int, types: Types) -> None:
    _note(graph.inputs, types)
    for node in graph.nodes:
        _note((tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)), types)
        for body in node.subgraphs():
            _infer(body, opset, types)
        for tensor, found in zip(node.outputs, _results(node, opset, types), strict=False):
            if found is not None:
                types[id(tensor)] = found


def _note(tensors: Any, types: Types) -> None:
    for tensor in tensors:
        found = type_of(tensor)
        if found is not None:
            types[id(tensor)] = found


def _results(node: gs.Node, opset: int, types: Types) -> Iterator[int | None]:
    """The type of each result of ``node``."""
    bodies = list(node.subgraphs())
    if bodies:  # a Loop's body gives first whether to go on
        ends = bodies[0].outputs[1:] if node.op == "Loop" else bodies[0].outputs
        yield from (types.get(id(tensor), type_of(tensor)) for tensor in ends)
        return
    schema = schema_of(node, opset)
    for index in range(len(node.outputs)):
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            yield FLOAT if value is None else type_of(value)
        elif _BY_ATTRIBUTE.get(node.op) in node.attrs:
            yield node.attrs[_BY_ATTRIBUTE[node.op]]
        elif node.op == "DequantizeLinear":  # from opset 23 on its result has a letter of its own
            yield node.attrs.get("output_dtype") or types.get(id(node.inputs[1]))
        elif schema is None:
            yield types.get(id(node.inputs[0])) if node.inputs else None
        else:
            yield _by_schema(node, schema, formal(schema.outputs, index).type_str, types)


def _by_schema(node: gs.Node, schema: onnx.defs.OpSchema, wanted: str, types: Types) -> int | None:
    """The type that ``wanted`` stands for: itself, or that of an operand for which the same letter stands."""
    if wanted.startswith("tensor("):
        return int(onnx.TensorProto.DataType.Value(wanted[len("tensor(") : -1].upper()))
    for index, tensor in enumerate(node.inputs):
        if formal(schema.inputs, index).type_str == wanted and id(tensor) in types:
            return types[id(tensor)]
    return None
