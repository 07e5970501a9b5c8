"""Step over what an exporter without an optimiser writes for nothing: ops that give what they read."""

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer


def before(tensor: gs.Tensor) -> gs.Tensor:
    """``tensor`` before such ops."""
    node = producer(tensor)
    while node is not None and is_no_op(node):
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor


def behind(tensor: gs.Tensor) -> gs.Tensor:
    """``tensor`` after such ops, as long as each is its only consumer."""
    while len(tensor.outputs) == 1 and is_no_op(tensor.outputs[0]):
        tensor = tensor.outputs[0].outputs[0]
    return tensor


def is_no_op(node: gs.Node) -> bool:
    """Whether ``node`` gives what it reads first: the same order of axes, one thing put together, its own shape."""
    match node.op:
        case "Identity":
            return True
        case "Transpose":
            perm = node.attrs.get("perm", [])
            return bool(perm) and list(perm) == sorted(perm)
        case "Concat" | "Max":
            return len(node.inputs) == 1
        case "Expand":
            shape = produced_by(node.inputs[1], "Shape")
            return shape is not None and before(shape.inputs[0]) is before(node.inputs[0])
    return False
