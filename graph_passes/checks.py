"""What an untrusted file must be like before anything is done with it."""

from pathlib import Path

import onnx

from graph_passes.protos import bodies, every_graph
from graph_passes.stored import dtype_of
from moe_spec.errors import UserError

_MEND = "give a file that torch.onnx, `moe-edge export` or another exporter wrote"

UNHELD = (
    onnx.AttributeProto.GRAPHS,
    onnx.AttributeProto.TENSORS,
    onnx.AttributeProto.SPARSE_TENSOR,
    onnx.AttributeProto.SPARSE_TENSORS,
    onnx.AttributeProto.TYPE_PROTO,
    onnx.AttributeProto.TYPE_PROTOS,
)
"""Attributes that graphsurgeon drops."""


def check_file(model: onnx.ModelProto, path: Path) -> None:
    """Every node has the inputs and attributes that its operator wants, and every weight a type that there is.

    Raises:
        UserError: with the node or the weight.
    """
    if not model.graph.node:
        raise UserError(f"{path} is no ONNX model: its graph has no node", hint=_MEND)
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {entry.domain: entry.version for entry in model.opset_import}
    for graph in every_graph(model.graph):
        for node in graph.node:
            _check_node(node, context, path)
        for tensor in graph.initializer:
            dtype_of(tensor)
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise UserError(f"{path}: weight {name} is sparse, which is not supported", hint="store it densely")


def _check_node(node: onnx.NodeProto, context: onnx.checker.C.CheckerContext, path: Path) -> None:
    where = f"{path}: node {node.op_type} {node.name or (node.output[0] if node.output else '')!r}"
    for attribute in node.attribute:
        if attribute.type in UNHELD:
            raise UserError(f"{where} has an attribute that is not supported: {attribute.name}", hint=_MEND)
    try:
        onnx.checker.check_node(_without_bodies(node), context)
    except onnx.checker.ValidationError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{where} is malformed: {reason}", hint=_MEND) from error


def _without_bodies(node: onnx.NodeProto) -> onnx.NodeProto:
    """``node`` with empty bodies: the checker knows nothing of the values that real ones take from around them."""
    if not bodies(node):
        return node
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    for body in bodies(bare):
        body.CopyFrom(onnx.GraphProto(name="empty"))
    return bare
