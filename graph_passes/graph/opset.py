"""Let a graph be written for a newer opset, where that changes none of its ops: quantised weights need one."""

import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import every_node
from moe_spec.errors import UserError

IR_VERSIONS = {21: 10, 23: 11}
"""The version of ONNX's files that knows the types of an opset: integers of 4 bits, then floats of 4 bits."""


def raise_opset(graph: gs.Graph, needed: int, why: str) -> bool:
    """Let ``graph`` be written for opset ``needed`` if it is for an older one; whether it was.

    Raises:
        UserError: an op of it changed in between; ``why`` says what needs the opset.
    """
    if graph.opset >= needed:
        return False
    changed = sorted(
        {node.op for node in every_node(graph) if not node.domain and _changed(node.op, graph.opset, needed)}
    )
    if changed:
        raise UserError(
            f"{why} needs opset {needed}, the model is written for {graph.opset}, and {', '.join(changed)} changed in "
            "between",
            hint=f"export the model again with --opset {needed}, or another exporter's option of that name",
        )
    graph.opset = needed
    for entry in graph.import_domains or ():
        if not entry.domain:
            entry.version = needed
    known = max((version for since, version in IR_VERSIONS.items() if since <= needed), default=0)
    graph.ir_version = max(graph.ir_version or 0, known)
    return True


def _changed(op: str, old: int, new: int) -> bool:
    """Whether an op means something else: it lost an input, an attribute or its default.

    >>> _changed("MatMul", 20, 23), _changed("ReduceMax", 17, 20)
    (False, True)
    """
    before, after = (onnx.defs.get_schema(op, version) for version in (old, new))
    if before.since_version == after.since_version:
        return False
    inputs, attributes = _inputs(before), _attributes(before)
    return _inputs(after)[: len(inputs)] != inputs or not attributes <= _attributes(after)


def _inputs(schema: onnx.defs.OpSchema) -> list[str]:
    return [entry.name for entry in schema.inputs]


def _attributes(schema: onnx.defs.OpSchema) -> set[tuple[str, bytes]]:
    """Names and defaults."""
    return {(name, entry.default_value.SerializeToString()) for name, entry in schema.attributes.items()}
