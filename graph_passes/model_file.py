"""ONNX files in and out, weights streamed: peak memory is the largest single tensor, not the model."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from graph_passes.stored import LazyWeight, dtype_of, of_constant, packed_bytes
from graph_passes.weights import Weight
from moe_spec.errors import UserError
from moe_spec.files import inside, require_file
from moe_spec.manifest import MODEL

ALIGNMENT = 4096
"""Offsets in the data file, so that runtimes can memory-map each weight."""

INLINE_BYTES = 1024
"""Smaller constants stay in the .onnx file: shapes, axes, scales."""

_MEND = "give a file that torch.onnx, `moe-edge export` or another exporter wrote"

G_LOGGER.severity = G_LOGGER.ERROR  # it prints to stdout, which belongs to results


def model_path(path: Path) -> Path:
    """The .onnx file that ``path`` (a model directory or the file itself) stands for.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        return require_file(path / MODEL, f"a model directory with {MODEL}")
    return require_file(path, "an ONNX file or a model directory")


def load_graph(path: Path) -> gs.Graph:
    """Read the structure of an ONNX file; weights stay where they are, and their extents are checked.

    Raises:
        UserError: no ONNX file, or external data that is missing, cut or outside the directory.
    """
    model = _parse(path)
    _lift_constants(model.graph)
    graph = gs.import_onnx(model)
    try:
        graph.toposort()
    except OnnxGraphSurgeonException as error:
        raise UserError(f"{path}: the graph cannot be put in order: {error}", hint=_MEND) from error
    for tensor in constants(graph):
        of_constant(tensor, path.parent)
    return graph


def _parse(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise UserError(f"{path} is no readable ONNX file: {error}", hint=_MEND) from error
    if not model.graph.node:
        raise UserError(f"{path} is no ONNX model: its graph has no node", hint=_MEND)
    _check_nodes(model, path)
    for tensor in model.graph.initializer:
        dtype_of(tensor)
    return model


def _check_nodes(model: onnx.ModelProto, path: Path) -> None:
    """Every node has the inputs and attributes that its operator wants; readers rely on it."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError as error:
            name = node.name or (node.output[0] if node.output else "")
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path}: node {node.op_type} {name!r} is malformed: {reason}", hint=_MEND) from error


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes become initialisers, so that readers see one kind of constant."""
    kept = []
    for node in graph.node:
        value = _constant_value(node) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
        else:
            value.name = node.output[0]
            graph.initializer.append(value)
    del graph.node[:]
    graph.node.extend(kept)


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node; None where it holds a string or a sparse tensor."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor: onnx.TensorProto = attribute.t
        return tensor
    kinds = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if attribute.name not in kinds:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return onnx.numpy_helper.from_array(np.asarray(value, kinds[attribute.name]))


def constants(graph: gs.Graph) -> list[gs.Constant]:
    """Every constant that a node of the graph reads, once, in the order of use."""
    found: dict[int, gs.Constant] = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                found.setdefault(id(tensor), tensor)
    return list(found.values())


def weight_bytes(graph: gs.Graph, directory: Path) -> int:
    """Bytes of every constant of the graph."""
    return sum(of_constant(tensor, directory).nbytes for tensor in constants(graph))


def save_graph(
    graph: gs.Graph, source: Path, target: Path, on_progress: Callable[[int, int], None] | None = None
) -> None:
    """Write ``graph`` (whose weights may lie in ``source``, a directory) as ``target`` and ``target.data``.

    Afterwards the graph's weights lie in the new data file, so that a variant of it can be saved beside ``target``
    with `save_variant`, sharing the weights. ``on_progress(done, total)`` counts bytes.
    """
    weights = [(tensor, of_constant(tensor, source)) for tensor in constants(graph)]
    total = sum(weight.nbytes for _, weight in weights)
    data, done = target.with_name(target.name + ".data"), 0
    with data.open("wb") as file:
        for tensor, weight in weights:
            if weight.nbytes < INLINE_BYTES:
                tensor._values = LazyValues(onnx.numpy_helper.from_array(np.array(weight.load(), order="C")))
            else:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                tensor._values = LazyValues(_external(tensor.name, weight, data.name, file.tell()))
                for piece in weight.pieces():
                    packed_bytes(piece).tofile(file)
            tensor.data_location = None
            done += weight.nbytes
            if on_progress is not None:
                on_progress(done, total)
    if data.stat().st_size == 0:
        data.unlink()
    save_variant(graph, target)
    onnx.checker.check_model(str(target))


def save_variant(graph: gs.Graph, target: Path) -> None:
    """Write ``graph`` as ``target``; its large weights lie in a data file beside it already."""
    _forget_shapes(graph)
    graph.functions = [function for function in graph.functions if _is_called(graph, function)]
    model = gs.export_onnx(graph, do_type_check=False)
    model.producer_name = "moe-edge"
    onnx.save(onnx.shape_inference.infer_shapes(model), target)


def data_files(graph: gs.Graph) -> tuple[str, ...]:
    """The external data files that hold the graph's weights, as the file names them."""
    locations = set()
    for tensor in constants(graph):
        values = tensor._values
        stored = isinstance(values, LazyValues) and not isinstance(values, LazyWeight)
        if stored and onnx.external_data_helper.uses_external_data(values.tensor):
            locations.add(onnx.external_data_helper.ExternalDataInfo(values.tensor).location)
    return tuple(sorted(locations))


def copy_weights(graph: gs.Graph, source: Path, target: Path) -> None:
    """Copy the graph's external data files into ``target``, under the names that the graph has for them."""
    for location in data_files(graph):
        path = inside(target, location, target / MODEL)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(source, location, source / MODEL), path)


def link_weights(graph: gs.Graph, source: Path, target: Path) -> None:
    """Put the graph's external data files into ``target``, without a copy where the file system allows."""
    for location in data_files(graph):
        original, link = inside(source, location, source / MODEL), inside(target, location, target / MODEL)
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(original.resolve(), link)
        except OSError:  # another file system
            shutil.copyfile(original, link)


def _external(name: str, weight: Weight, location: str, offset: int) -> onnx.TensorProto:
    proto = onnx.TensorProto(name=name, dims=weight.shape, data_location=onnx.TensorProto.EXTERNAL)
    proto.data_type = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(weight.nbytes))):
        proto.external_data.add(key=key, value=value)
    return proto


def _forget_shapes(graph: gs.Graph) -> None:
    """Intermediate shapes name the old E and K; they are inferred anew."""
    ends = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for node in graph.nodes:
        for tensor in node.outputs:
            if isinstance(tensor, gs.Variable) and id(tensor) not in ends:
                tensor.shape, tensor.dtype = None, None


def _is_called(graph: gs.Graph, function: gs.Function) -> bool:
    return any(node.domain == function.domain and node.op == function.name for node in graph.nodes)
