"""What a graph computes of its weights alone: taken out of it, to be done to the values when they are there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[Any]


def fold(model: onnx.ModelProto, parameters: Mapping[str, onnx.TensorProto]) -> dict[str, onnx.ModelProto]:
    """Take the nodes that compute of ``parameters`` alone out of ``model``, above all transposes of dense weights.

    1. What they give to other nodes becomes initialisers, without values; one that is made of a single parameter has a
       name that says so: ``lm_head.weight.transpose``.
    2. A parameter that is also read as it is, such as a tied embedding, is left to the graph: it is stored once.

    Returns:
        For each new initialiser the model that makes it of parameters.
    """
    nodes, constants = list(model.graph.node), {tensor.name: tensor for tensor in model.graph.initializer}
    shapes = {value.name: value for value in model.graph.value_info if _is_static(value)}
    dependent = _made_of(nodes, parameters, constants, shapes)
    shared = set(names_read(node for index, node in enumerate(nodes) if index not in dependent))
    taken = _made_of(nodes, parameters.keys() - shared, constants, shapes)
    left = [node for index, node in enumerate(nodes) if index not in taken]
    read = {*names_read(left), *(value.name for value in model.graph.output)}
    sources = {name: index for index in taken for name in nodes[index].output}
    folded = {}
    for name in [name for name in sources if name in read]:
        chain = [nodes[index] for index in sorted(_behind(name, nodes, sources))]
        folded[name] = _recipe(chain, shapes[name], parameters, constants, model)
    del model.graph.node[:]
    model.graph.node.extend(left)
    model.graph.initializer.extend(empty_tensor(name, shapes[name]) for name in folded)
    return _renamed(model, folded)


def evaluate(recipe: onnx.ModelProto, values: Mapping[str, Array]) -> Array:
    """What a model of `fold` makes of parameters.

    >>> import onnx.parser
    >>> text = '<ir_version: 10, opset_import: ["": 20]> g (float[2, 1] w) => (float[1, 2] t) { t = Transpose(w) }'
    >>> evaluate(onnx.parser.parse_model(text), {"w": np.array([[1.0], [2.0]], np.float32)})
    array([[1., 2.]], dtype=float32)
    """
    (result,) = ReferenceEvaluator(recipe).run(None, dict(values))
    return np.ascontiguousarray(result)


def empty_tensor(name: str, value: onnx.ValueInfoProto) -> onnx.TensorProto:
    """An initialiser of the shape and dtype of ``value``, without values."""
    tensor = value.type.tensor_type
    return onnx.TensorProto(name=name, data_type=tensor.elem_type, dims=[dim.dim_value for dim in tensor.shape.dim])


def with_bodies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those in their bodies: branches of an If, steps of a Loop."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from with_bodies(attribute.g.node)


def names_read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """What nodes read, in their bodies too."""
    return (name for node in with_bodies(nodes) for name in node.input)


def _made_of(
    nodes: Sequence[onnx.NodeProto], parameters: Iterable[str], constants: Iterable[str], shapes: Iterable[str]
) -> set[int]:
    """Places of the nodes that read parameters, or what is made of them, and besides that constants only."""
    made, still = set(parameters), {"", *constants}
    found = set()
    for index, node in enumerate(nodes):
        read = set(node.input)
        plain = not any(attribute.HasField("g") for attribute in node.attribute)
        if plain and read & made and read <= made | still and set(node.output) <= set(shapes):
            made.update(node.output)
            found.add(index)
    return found


def _behind(name: str, nodes: Sequence[onnx.NodeProto], sources: Mapping[str, int]) -> set[int]:
    """Places of the nodes that lead to the value ``name``."""
    if name not in sources:
        return set()
    index = sources[name]
    return {index}.union(*(_behind(read, nodes, sources) for read in nodes[index].input))


def _recipe(
    chain: Sequence[onnx.NodeProto],
    result: onnx.ValueInfoProto,
    parameters: Mapping[str, onnx.TensorProto],
    constants: Mapping[str, onnx.TensorProto],
    model: onnx.ModelProto,
) -> onnx.ModelProto:
    read = dict.fromkeys(name for node in chain for name in node.input)
    inputs = [
        onnx.helper.make_tensor_value_info(name, parameters[name].data_type, parameters[name].dims)
        for name in read
        if name in parameters
    ]
    held = [constants[name] for name in read if name in constants]
    graph = onnx.helper.make_graph(chain, "folded", inputs, [result], held)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _renamed(model: onnx.ModelProto, folded: Mapping[str, onnx.ModelProto]) -> dict[str, onnx.ModelProto]:
    """Names that say what is folded: ``val_76`` is ``model.layers.0.self_attn.q_proj.weight.transpose``."""
    names: dict[str, str] = {}
    for name, recipe in folded.items():
        words = [value.name for value in recipe.graph.input] + [node.op_type.lower() for node in recipe.graph.node]
        telling = ".".join(words)
        names[name] = telling if len(recipe.graph.input) == 1 and telling not in names.values() else name
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in with_bodies(model.graph.node):
        node.input[:] = [names.get(name, name) for name in node.input]
    return {names[name]: recipe for name, recipe in folded.items()}


def _is_static(value: onnx.ValueInfoProto) -> bool:
    return all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
