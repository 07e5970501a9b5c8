"""A graph of halves as one of float32: what ONNX Runtime has no kernels for can be run, and rounding told from faults.

The weights are those that were rounded, every cast to halves is none, so that what is left of the rounding is that of
the graph's own numbers, such as the scale of attention.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from exporter.fold import with_bodies

HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def save_widened(source: Path, target: Path) -> None:
    """Write ``source`` with float32 in the place of float16 and bfloat16; all weights are in memory meanwhile."""
    model = onnx.load(source)
    for tensor in _tensors(model):
        if tensor.data_type in HALVES:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in HALVES:
                attribute.i = onnx.TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data")


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    yield from (attribute.t for node in _nodes(model) for attribute in node.attribute if attribute.HasField("t"))


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return with_bodies([*model.graph.node, *(node for function in model.functions for node in function.node)])
