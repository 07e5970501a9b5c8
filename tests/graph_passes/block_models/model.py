"""Puts blocks into a model and the model into a file."""

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import helper

from exporter.experts_function import function_of
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import Builder
from tests.graph_passes.block_models.kinds import FORMS
from tests.graph_passes.block_models.limits import why_not
from tests.graph_passes.block_models.spec import Spec, layer_name
from tests.graph_passes.block_models.tensors import drawn

IR_VERSION = 10
INPUT, OUTPUT = "x", "out"
FUNCTION_DOMAIN, FUNCTION, FUNCTION_SCOPE = "blocks", "MoEBlock", "mlp"


def save(spec: Spec, path: Path) -> None:
    """Write the model, ``x -> out``, both (tokens, H) or (batch, sequence, H)."""
    model = build(spec)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def build(spec: Spec) -> onnx.ModelProto:
    """The model in memory."""
    reason = why_not(spec)
    assert reason is None, reason
    b, write = Builder(spec), _call if spec.in_function else _write
    value = b.fresh(INPUT)
    functions = [function_of(spec.op, spec.opset)] if spec.form == "experts" else []
    for index in range(spec.layers):
        out, body = write(b, index, value)
        functions += [] if body is None or index else [body]
        value = b.op("Add", value, out) if spec.layers > 1 else out
    b.rename(value, OUTPUT)
    dims: list[str | int | None] = ["tokens", spec.hidden] if spec.rank == 2 else ["batch", "sequence", spec.hidden]
    graph = helper.make_graph(
        b.nodes,
        "block",
        [helper.make_tensor_value_info(INPUT, b.element_type, dims)],
        [helper.make_tensor_value_info(OUTPUT, b.element_type, dims), *b.outputs],
        list(b.initializers.values()),
    )
    used = [*b.nodes, *(node for function in functions for node in function.node)]
    return helper.make_model(graph, opset_imports=_opsets(spec, used), functions=functions, ir_version=IR_VERSION)


def _call(b: Builder, index: int, x: str) -> tuple[str, onnx.FunctionProto]:
    """A node that calls the layer as a function of its input and its weights, and the function."""
    body = Builder(b.spec, is_function=True)
    out = _emit(body, FUNCTION_SCOPE, index, body.fresh(INPUT))
    body.rename(out, OUTPUT)
    inputs, opsets = [INPUT, *body.formals], _opsets(b.spec, body.nodes)
    function = helper.make_function(FUNCTION_DOMAIN, FUNCTION, inputs, [OUTPUT], body.nodes, opsets)
    names = [name.replace(FUNCTION_SCOPE, _scope(b.spec, index), 1) for name in body.weights]
    actual = [b.weight(name, array) for name, array in zip(names, body.weights.values(), strict=True)]
    return b.op(FUNCTION, x, *actual, domain=FUNCTION_DOMAIN), function


def _write(b: Builder, index: int, x: str) -> tuple[str, None]:
    return _emit(b, _scope(b.spec, index), index, x), None


def _emit(b: Builder, scope: str, index: int, x: str) -> str:
    """The layer's output in the shape of ``x``."""
    spec = b.spec
    hidden = x if spec.rank == 2 else b.op("Reshape", x, [-1, spec.hidden], out="view", allowzero=1)
    out = FORMS[spec.form](Block(b, scope, drawn(spec, index), x, hidden))
    if spec.rank == 2:
        return out
    lengths = [b.op("Shape", x, start=axis, end=axis + 1) for axis in (0, 1)]
    return b.op("Reshape", out, b.op("Concat", *lengths, [spec.hidden], axis=0), out="view", allowzero=1)


def _scope(spec: Spec, index: int) -> str:
    """What the names of a layer's weights begin with."""
    return layer_name(0 if spec.tied else index)


def _opsets(spec: Spec, nodes: Iterable[onnx.NodeProto]) -> list[onnx.OperatorSetIdProto]:
    foreign = sorted({node.domain for node in nodes} - {""})
    return [helper.make_opsetid("", spec.opset), *(helper.make_opsetid(domain, 1) for domain in foreign)]
