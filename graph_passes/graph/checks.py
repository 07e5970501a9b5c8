"""What an untrusted file must be like before anything is done with it."""

from collections import Counter
from pathlib import Path

import onnx

from graph_passes.graph import runtime_ops
from graph_passes.graph.protos import bodies, every_graph
from graph_passes.weights.stored import check_stored
from moe_spec.errors import UserError

_MEND = "give a file that torch.onnx, `moe-edge export` or another exporter wrote"

TYPES = frozenset(onnx.helper.get_all_tensor_dtypes()) - {onnx.TensorProto.UNDEFINED}

MOST_VERSIONS = 1000
"""No opset is that new."""

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
    """Every node has the inputs and attributes that its operator wants; every weight a type and a size that there are.

    Raises:
        UserError: with the node, the value or the weight.
    """
    if not model.graph.node:
        raise UserError(f"{path} is no ONNX model: its graph has no node", hint=_MEND)
    context = _context(model, path)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.WhichOneof("value") != "tensor_type" or value.type.tensor_type.elem_type not in TYPES:
            raise UserError(f"{path}: {value.name!r} is no tensor of a known type", hint=_MEND)
    for value in model.graph.input:
        if not value.type.tensor_type.HasField("shape"):
            raise UserError(
                f"{path} does not say how many axes its input {value.name!r} has",
                hint="export it with the axes of every input, dynamic ones too",
            )
    for graph in every_graph(model.graph):
        for node in graph.node:
            _check_node(node, context, path)
        for tensor in graph.initializer:
            check_stored(tensor)
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise UserError(f"{path}: weight {name} is sparse, which is not supported", hint="store it densely")
    _check_names(model.graph, frozenset(), path)


def _context(model: onnx.ModelProto, path: Path) -> onnx.checker.C.CheckerContext:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    strange = [version for version in opsets.values() if not 0 < version < MOST_VERSIONS]
    if strange:
        raise UserError(f"{path} is written for the opset {strange[0]}, which cannot be", hint=_MEND)
    others = {node.domain: 1 for node in model.graph.node if node.domain}  # fused exports leave out com.microsoft
    runtime_ops.register()
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = model.ir_version, {**others, **opsets}
    return context


def _check_node(node: onnx.NodeProto, context: onnx.checker.C.CheckerContext, path: Path) -> None:
    where = f"{path}: node {node.op_type} {node.name or (node.output[0] if node.output else '')!r}"
    for attribute in node.attribute:
        if attribute.type in UNHELD:
            raise UserError(f"{where} has an attribute that is not supported: {attribute.name}", hint=_MEND)
        if attribute.type == onnx.AttributeProto.TENSOR:
            check_stored(attribute.t)
    try:
        onnx.checker.check_node(_without_bodies(node), context)
    except onnx.checker.ValidationError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{where} is malformed: {reason}", hint=_MEND) from error
    parts = next((entry.i for entry in node.attribute if entry.name == "num_outputs"), len(node.output))
    results = {len(body.output) for body in bodies(node) if node.op_type == "If"} | {len(node.output)}
    if (node.op_type == "Split" and parts != len(node.output)) or len(results) > 1:
        raise UserError(f"{where} is malformed: it has {len(node.output)} outputs", hint=_MEND)


def _without_bodies(node: onnx.NodeProto) -> onnx.NodeProto:
    """``node`` with empty bodies: the checker knows nothing of the values that real ones take from around them."""
    if not bodies(node):
        return node
    bare = onnx.NodeProto()
    bare.CopyFrom(node)
    for body in bodies(bare):
        body.CopyFrom(onnx.GraphProto(name="empty"))
    return bare


def _check_names(graph: onnx.GraphProto, around: frozenset[str], path: Path) -> None:
    """Every value that is read is given, by one node; a body may read what lies around it."""
    weights = {tensor.name for tensor in graph.initializer}
    given = Counter(name for node in graph.node for name in node.output if name)
    given.update(weights | {value.name for value in graph.input})
    twice = next((name for name, count in given.items() if count > 1), None)
    if twice is not None or len(weights) < len(graph.initializer):
        name = twice or next(name for name, count in Counter(t.name for t in graph.initializer).items() if count > 1)
        raise UserError(f"{path}: the value {name!r} is given twice", hint=_MEND)
    known = around | given.keys() | {""}
    for node in graph.node:
        for name in node.input:
            if name not in known:
                raise UserError(f"{path}: node {node.op_type} reads {name!r}, which nothing gives", hint=_MEND)
        for body in bodies(node):
            _check_names(body, known, path)
    for value in graph.output:
        if value.name not in known:
            raise UserError(f"{path}: nothing gives the output {value.name!r}", hint=_MEND)
