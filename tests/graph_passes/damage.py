"""Ways in which a model file can be broken, by accident or on purpose: ``damage(model, rng)`` edits it in place."""

import random
from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto

Damage = Callable[[ModelProto, random.Random], None]

ODD_LENGTHS = (0, 1, 3, 1 << 40, 1 << 60, (1 << 63) - 1, -1, -(1 << 40))
ODD_NUMBERS = (-1, 0, 1, 3, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))


def _node(model: ModelProto, rng: random.Random) -> NodeProto:
    return rng.choice([node for node in model.graph.node if node.input])


def drop_input(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    del node.input[rng.randrange(len(node.input))]


def forget_input(model: ModelProto, rng: random.Random) -> None:
    """As an optional input is left out."""
    node = _node(model, rng)
    node.input[rng.randrange(len(node.input))] = ""


def swap_inputs(model: ModelProto, rng: random.Random) -> None:
    one, other = _node(model, rng), _node(model, rng)
    here, there = rng.randrange(len(one.input)), rng.randrange(len(other.input))
    one.input[here], other.input[there] = other.input[there], one.input[here]


def drop_node(model: ModelProto, rng: random.Random) -> None:
    del model.graph.node[rng.randrange(len(model.graph.node))]


def drop_output(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    del node.output[rng.randrange(len(node.output))]


def change_op(model: ModelProto, rng: random.Random) -> None:
    _node(model, rng).op_type = rng.choice(["Relu", "MatMul", "TopK", "Reshape", "If", "Nonsense"])


def change_domain(model: ModelProto, rng: random.Random) -> None:
    _node(model, rng).domain = rng.choice(["com.microsoft", "moe_edge", "unheard.of"])


def drop_attribute(model: ModelProto, rng: random.Random) -> None:
    node = rng.choice([node for node in model.graph.node if node.attribute] or [_node(model, rng)])
    if node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]


def change_attribute(model: ModelProto, rng: random.Random) -> None:
    numbers = [entry for node in model.graph.node for entry in node.attribute if entry.type == onnx.AttributeProto.INT]
    if numbers:
        rng.choice(numbers).i = rng.choice(ODD_NUMBERS)


def retype_attribute(model: ModelProto, rng: random.Random) -> None:
    entries = [entry for node in model.graph.node for entry in node.attribute]
    if entries:
        entry = rng.choice(entries)
        entry.CopyFrom(onnx.helper.make_attribute(entry.name, rng.choice([1.5, "text", [1, 2], 7])))


def drop_initializer(model: ModelProto, rng: random.Random) -> None:
    del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def change_length(model: ModelProto, rng: random.Random) -> None:
    tensor = rng.choice([tensor for tensor in model.graph.initializer if tensor.dims])
    tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(ODD_LENGTHS)


def overflow_size(model: ModelProto, rng: random.Random) -> None:
    """Lengths whose product is 0 in 64 bits."""
    tensor = rng.choice([tensor for tensor in model.graph.initializer if tensor.dims])
    tensor.dims[:] = [1 << 32, 1 << 32, *tensor.dims]


def transpose_shape(model: ModelProto, rng: random.Random) -> None:
    tensor = rng.choice([tensor for tensor in model.graph.initializer if len(tensor.dims) > 1])
    tensor.dims[:] = list(reversed(tensor.dims))


def change_type(model: ModelProto, rng: random.Random) -> None:
    types = [TensorProto.INT64, TensorProto.FLOAT16, TensorProto.INT4, TensorProto.STRING, TensorProto.COMPLEX64, 0, 99]
    rng.choice(model.graph.initializer).data_type = rng.choice(types)


def cut_values(model: ModelProto, rng: random.Random) -> None:
    tensor = rng.choice([tensor for tensor in model.graph.initializer if tensor.raw_data])
    tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data))]


def change_number(model: ModelProto, rng: random.Random) -> None:
    """K, an axis or a shape is something else."""
    whole = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT64]
    if whole:
        tensor = rng.choice(whole)
        values = onnx.numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[rng.randrange(max(1, values.size)) :] = rng.choice(ODD_NUMBERS)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def poison(model: ModelProto, rng: random.Random) -> None:
    """A weight of NaN or infinity."""
    floats = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    tensor = rng.choice(floats)
    full = np.full(tuple(tensor.dims), rng.choice([np.nan, np.inf, -np.inf]), np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(full, tensor.name))


def duplicate_name(model: ModelProto, rng: random.Random) -> None:
    model.graph.initializer[0].name = rng.choice(model.graph.initializer).name


def duplicate_value(model: ModelProto, rng: random.Random) -> None:
    one, other = _node(model, rng), _node(model, rng)
    one.output[0] = other.output[0]


def make_cycle(model: ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    node.input[0] = rng.choice(model.graph.node[-1].output or [node.output[0]])


def shuffle_nodes(model: ModelProto, rng: random.Random) -> None:
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def point_elsewhere(model: ModelProto, rng: random.Random) -> None:
    """External data that is missing, outside the directory, or where no byte is."""
    tensor = rng.choice(model.graph.initializer)
    for field in ("raw_data", "float_data", "int64_data", "int32_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    places = [
        {"location": name} for name in ("", "none.data", "../x", "/etc/passwd", "block.onnx/x", ".", "block.onnx")
    ]
    for key, value in rng.choice([*places, {"location": "block.onnx", "offset": "-5"}, {"offset": "x"}, {}]).items():
        tensor.external_data.add(key=key, value=value)


def change_opset(model: ModelProto, rng: random.Random) -> None:
    if rng.random() < 0.3:
        del model.opset_import[:]
    else:
        model.opset_import[0].version = rng.choice([0, 1, 9, 99, -3, 1 << 40])


def change_ends(model: ModelProto, rng: random.Random) -> None:
    """An input or output of the graph is not what it was."""
    value = rng.choice([*model.graph.input, *model.graph.output])
    change = rng.choice(["name", "dim", "type", "none"])
    if change == "name":
        value.name = "unheard_of"
    elif change == "dim":
        value.type.tensor_type.shape.dim[-1].dim_value = rng.choice([-1, 0, 3, 1 << 40])
    elif change == "type":
        value.type.tensor_type.elem_type = rng.choice([0, TensorProto.STRING, TensorProto.INT64, 99])
    else:
        value.ClearField("type")


def drop_ends(model: ModelProto, rng: random.Random) -> None:
    del (model.graph.input if rng.random() < 0.5 else model.graph.output)[:]


def forget_axes(model: ModelProto, rng: random.Random) -> None:
    """Nobody says how many axes an input or output has."""
    rng.choice([*model.graph.input, *model.graph.output]).type.tensor_type.ClearField("shape")


def add_number(model: ModelProto, rng: random.Random) -> None:
    """An input without axes."""
    name, kind = rng.choice([("position", TensorProto.INT64), ("scale", TensorProto.FLOAT), ("mask", TensorProto.BOOL)])
    model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, []))


def wrap_in_condition(model: ModelProto, rng: random.Random) -> None:
    """A constant ``If`` around the last node, one branch of which lacks something."""
    node = onnx.NodeProto.FromString(model.graph.node[-1].SerializeToString())
    results = [onnx.ValueInfoProto(name=name) for name in node.output]
    body = onnx.helper.make_graph([node], "body", [], results)
    other = onnx.helper.make_graph([], "other", [], results[rng.randrange(2) :])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(rng.random() < 0.5), "always"))
    wrapped = onnx.helper.make_node("If", ["always"], list(node.output), then_branch=body, else_branch=other)
    model.graph.node[-1].CopyFrom(wrapped)


DAMAGE: Mapping[str, Damage] = {
    damage.__name__: damage
    for damage in (
        drop_input,
        forget_input,
        swap_inputs,
        drop_node,
        drop_output,
        change_op,
        change_domain,
        drop_attribute,
        change_attribute,
        retype_attribute,
        drop_initializer,
        change_length,
        overflow_size,
        transpose_shape,
        change_type,
        cut_values,
        change_number,
        poison,
        duplicate_name,
        duplicate_value,
        make_cycle,
        shuffle_nodes,
        point_elsewhere,
        change_opset,
        change_ends,
        drop_ends,
        forget_axes,
        add_number,
        wrap_in_condition,
    )
}
"""By name."""
