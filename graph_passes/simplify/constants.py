"""One kind of constant: initialisers of the outermost graph. Constant nodes and the constants of bodies become such."""

import numpy as np
import onnx

from graph_passes.graph.protos import every_graph


def lift_constants(graph: onnx.GraphProto) -> None:
    """Make every constant of ``graph`` and of the bodies in it an initialiser of ``graph``, in place.

    Bodies may read what lies around them. graphsurgeon would write a constant that several bodies read once for each.
    Names must be unique (`graph_passes.simplify.names`).
    """
    parts = list(every_graph(graph))
    for part in parts:
        _lift_nodes(part)
    for body in parts[1:]:
        _hoist(body, graph)


def _lift_nodes(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        value = _constant_value(node) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
        else:
            value.name = node.output[0]
            graph.initializer.append(value)
    if len(kept) != len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node; None where it holds a string or a sparse tensor."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor: onnx.TensorProto = attribute.t
        return tensor
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if attribute.name not in kinds:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return onnx.numpy_helper.from_array(np.asarray(value, kinds[attribute.name]))


def _hoist(body: onnx.GraphProto, graph: onnx.GraphProto) -> None:
    """Move the initialisers of ``body`` into ``graph``; one that is a result of the body gets there by Identity."""
    results, inputs = {value.name for value in body.output}, {value.name for value in body.input}
    stay = [value for value in body.initializer if value.name in inputs]
    for value in (value for value in list(body.initializer) if value.name not in inputs):
        if value.name in results:
            name, value.name = value.name, f"{value.name}.constant"
            body.node.insert(0, onnx.helper.make_node("Identity", [value.name], [name]))
        graph.initializer.append(value)
    del body.initializer[:]
    body.initializer.extend(stay)
