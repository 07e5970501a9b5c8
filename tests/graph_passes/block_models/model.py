"""Puts blocks into a model and the model into a file."""

from pathlib import Path

import onnx
from onnx import helper

from exporter.experts_function import function_of
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import Builder
from tests.graph_passes.block_models.kinds import FORMS
from tests.graph_passes.block_models.limits import why_not
from tests.graph_passes.block_models.spec import Spec, layer_name
from tests.graph_passes.block_models.tensors import weights

IR_VERSION = 10
INPUT, OUTPUT = "x", "out"


def save(spec: Spec, path: Path) -> None:
    """Write the model, ``x -> out``, both (tokens, H) or (batch, sequence, H)."""
    model = build(spec)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def build(spec: Spec) -> onnx.ModelProto:
    """The model in memory."""
    reason = why_not(spec)
    assert reason is None, reason
    b = Builder(spec)
    value = b.fresh(INPUT)
    for index in range(spec.layers):
        out = _layer(b, index, value)
        value = b.op("Add", value, out) if spec.layers > 1 else out
    b.rename(value, OUTPUT)
    dims: list[str | int | None] = ["tokens", spec.hidden] if spec.rank == 2 else ["batch", "sequence", spec.hidden]
    graph = helper.make_graph(
        b.nodes,
        "block",
        [helper.make_tensor_value_info(INPUT, b.element_type, dims)],
        [helper.make_tensor_value_info(OUTPUT, b.element_type, dims)],
        list(b.initializers.values()),
    )
    functions = [function_of(spec.op, spec.opset)] if spec.form == "experts" else []
    return helper.make_model(graph, opset_imports=_opsets(b), functions=functions, ir_version=IR_VERSION)


def _layer(b: Builder, index: int, x: str) -> str:
    """The layer's output in the shape of ``x``."""
    spec = b.spec
    hidden = x if spec.rank == 2 else b.op("Reshape", x, [-1, spec.hidden], out="view", allowzero=1)
    name = layer_name(0 if spec.tied else index)
    out = FORMS[spec.form](Block(b, name, weights(spec, index), x, hidden))
    if spec.rank == 2:
        return out
    lengths = [b.op("Shape", x, start=axis, end=axis + 1) for axis in (0, 1)]
    return b.op("Reshape", out, b.op("Concat", *lengths, [spec.hidden], axis=0), out="view", allowzero=1)


def _opsets(b: Builder) -> list[onnx.OperatorSetIdProto]:
    foreign = sorted({node.domain for node in b.nodes} - {""})
    return [helper.make_opsetid("", b.spec.opset), *(helper.make_opsetid(domain, 1) for domain in foreign)]
