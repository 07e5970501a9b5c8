"""Graphs as text, cast to float16, as text again."""

from pathlib import Path

import numpy as np
import onnx

from graph_passes.casts import cast_graph
from graph_passes.casts.assign import WIDE, Formats
from graph_passes.model_file import save_graph
from moe_spec.decoder import PAST, PRESENT
from moe_spec.manifest import MODEL

HALF = np.dtype(np.float16)
HALVES = Formats(WIDE, HALF)

HEADER = '<ir_version: 10, opset_import: ["" : {opset}, "other" : 1]>\n'


def cast_text(text: str, folder: Path, formats: Formats = HALVES, opset: int = 20) -> onnx.ModelProto:
    """The graph of ``text`` in ``formats``, checked: types are exact."""
    source, target = folder / "float32", folder / "cast"
    source.mkdir()
    target.mkdir()
    model = onnx.parser.parse_model(HEADER.format(opset=opset) + text)
    for value in (*model.graph.input, *model.graph.output):  # a name in ONNX's text has no dots
        value.name = value.name.replace("past_", PAST).replace("present_", PRESENT).replace("0_", "0.")
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("past_", PAST).replace("present_", PRESENT).replace("0_", "0.") for name in names]
    onnx.save(model, source / MODEL)
    save_graph(cast_graph(source / MODEL, formats), source, target / MODEL)
    onnx.checker.check_model(str(target / MODEL), full_check=True)
    return onnx.load(target / MODEL)


def lines(model: onnx.ModelProto) -> list[str]:
    """A line a node, as ONNX's text has it; casts say to what."""
    return [_line(node) for node in model.graph.node]


def formats_of(model: onnx.ModelProto) -> dict[str, str]:
    """The format of every float constant."""
    name_of = onnx.TensorProto.DataType.Name
    types = {value.name: name_of(value.data_type).lower() for value in model.graph.initializer}
    return {name: found for name, found in types.items() if "float" in found}


def _line(node: onnx.NodeProto) -> str:
    to = next((entry.i for entry in node.attribute if entry.name == "to"), None)
    kind = f" to {onnx.TensorProto.DataType.Name(to).lower()}" if to is not None else ""
    return f"{', '.join(node.output)} = {node.op_type}({', '.join(node.input)}){kind}"
