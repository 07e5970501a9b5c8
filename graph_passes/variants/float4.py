"""Weights of 4-bit floats where ONNX Runtime runs a graph: it has no kernel for their type (measured on 1.31).

The bytes stay where they are. Four bits are four bits, so the weight is called uint4, which it can cast, and a table
says which number each of the sixteen codes is. What remains unexecuted is DequantizeLinear of that one type.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graph_passes.model_file import model_path
from graph_passes.weights.weight import Array
from moe_spec.runner import Arrays, Feeds, OpenModel, Runner

NUMBERS = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
"""What each code is: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below 0."""

NOT_RUN = "DequantizeLinear of float4e2m1, of which ONNX Runtime has no kernel: its bytes were read as uint4 by a table"


@dataclasses.dataclass(frozen=True)
class Float4Runner:
    """``runner``, for which weights of 4-bit floats are written otherwise, in a file beside the model meanwhile."""

    runner: Runner

    @contextlib.contextmanager
    def open(self, model: Path) -> Iterator[OpenModel]:
        """The file, loaded for many batches."""
        with _readable(model_path(model)) as path, self.runner.open(path) as session:
            yield session

    def run(self, model: Path, batches: Sequence[Feeds], outputs: Sequence[str] | None = None) -> list[Arrays]:
        """Outputs by name for each batch of feeds."""
        with _readable(model_path(model)) as path:
            return self.runner.run(path, batches, outputs)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """``path``, or what is written in its place where it holds 4-bit floats."""
    model = onnx.load(path, load_external_data=False)
    if not holds_float4(model):
        yield path
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".float4.", suffix=".onnx") as file:
        without_float4(model)
        onnx.save(model, file.name)
        yield Path(file.name)


def save_for_cpu(source: Path, target: Path) -> bool:
    """Write the ONNX file ``source`` as ``target`` beside it, without 4-bit floats; whether it has any."""
    model = onnx.load(source, load_external_data=False)
    if not holds_float4(model):
        return False
    without_float4(model)
    onnx.save(model, target)
    return True


def holds_float4(model: onnx.ModelProto) -> bool:
    """Whether a weight of ``model`` is of 4-bit floats."""
    return any(tensor.data_type == TensorProto.FLOAT4E2M1 for tensor in model.graph.initializer)


def without_float4(model: onnx.ModelProto) -> None:
    """Write every DequantizeLinear of a 4-bit float weight, in blocks or with one scale, in ops of older types."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    types = {name: tensor.data_type for name, tensor in weights.items()}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        weight = weights.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if node.op_type == "DequantizeLinear":  # gives the type of its scales
            types[node.output[0]] = types.get(node.input[1], TensorProto.FLOAT)
        if weight is None or types[weight.name] != TensorProto.FLOAT4E2M1:
            nodes.append(node)
            continue
        weight.data_type = TensorProto.UINT4
        nodes += _looked_up(graph, node, list(weight.dims), types.get(node.input[1], TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]


def _looked_up(graph: onnx.GraphProto, node: onnx.NodeProto, shape: list[int], dtype: int) -> list[onnx.NodeProto]:
    """``table[codes] * scales``, each scale for its block."""
    (out,), (codes, scales) = node.output, node.input[:2]
    attributes: Mapping[str, int] = {entry.name: entry.i for entry in node.attribute}
    size, axis = attributes.get("block_size", 0), attributes.get("axis", 1) % len(shape)
    blocks = [*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :]] if size else shape

    def constant(label: str, values: Array) -> str:
        graph.initializer.append(numpy_helper.from_array(values, f"{out}/{label}"))
        return f"{out}/{label}"

    def op(kind: str, *inputs: str, label: str = "", **settings: Any) -> str:
        name = f"{out}/{label}" if label else out
        made.append(helper.make_node(kind, inputs, [name], name, **settings))
        return name

    made: list[onnx.NodeProto] = []
    table = constant("table", NUMBERS.astype(helper.tensor_dtype_to_np_dtype(dtype)))
    numbers = op("Gather", table, op("Cast", codes, label="codes", to=TensorProto.INT32), label="numbers")
    if not size:
        op("Mul", numbers, scales)
        return made
    column = op("Unsqueeze", scales, constant("axis", np.array([axis + 1])), label="scales")
    scaled = op(
        "Mul", op("Reshape", numbers, constant("blocks", np.array(blocks)), label="by_block"), column, label="scaled"
    )
    op("Reshape", scaled, constant("shape", np.array(shape)))
    return made
