"""ONNX files in and out, weights streamed: peak memory is the largest single tensor, not the model."""

import os
import shutil
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx_graphsurgeon.logger import G_LOGGER

from graph_passes.graph.checks import check_file
from graph_passes.graph.protos import every_graph
from graph_passes.graph.walk import constants, every_node
from graph_passes.simplify import Simplified, simplify
from graph_passes.weights.data_file import DataFile, external
from graph_passes.weights.stored import ExternalValues, LazyWeight, location_of, locations_of, of_constant, place_in
from moe_spec.errors import UserError
from moe_spec.external_data import INLINE_BYTES
from moe_spec.files import inside, require_file
from moe_spec.manifest import MODEL
from moe_spec.progress import Progress, silent

G_LOGGER.severity = G_LOGGER.ERROR  # it prints to stdout, which belongs to results


def model_path(path: Path) -> Path:
    """The .onnx file that ``path`` (a model directory or the file itself) stands for.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        if not (path / MODEL).is_file():
            raise UserError(
                f"{path} is no model directory: it has no {MODEL}", hint="give what export or optimize wrote"
            )
        return path / MODEL
    return require_file(path, "an ONNX file or a model directory")


def load_graph(path: Path) -> gs.Graph:
    """The graph of `load_model`."""
    return load_model(path).graph


def load_model(path: Path) -> Simplified:
    """Read the structure of an ONNX file; weights stay where they are, and their extents are checked.

    Raises:
        UserError: no ONNX file, or external data that is missing, cut or outside the directory.
    """
    model = _parse(path)
    check_file(model, path)
    return simplify(model, path)


def _parse(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError) as error:
        hint = "give a file that torch.onnx, `moe-edge export` or another exporter wrote"
        raise UserError(f"{path} is no readable ONNX file: {error}", hint=hint) from error


def save_graph(graph: gs.Graph, source: Path, target: Path, on_progress: Progress = silent) -> None:
    """Write ``graph`` (whose weights may lie in ``source``, a directory) as ``target`` and ``target.data``.

    Afterwards the graph's weights lie in the new data file, so that a variant of it can be saved beside ``target``
    with `save_variant`, sharing the weights. ``on_progress`` is told of the bytes.
    """
    data = DataFile(target.with_name(target.name + ".data"))
    for tensor, weight in [(tensor, of_constant(tensor, source)) for tensor in constants(graph)]:
        data.hold(tensor, weight)
    data.write(lambda: _save_checked(graph, target), on_progress)


def save_rewritten_variant(graph: gs.Graph, target: Path, *, check: bool = True) -> None:
    """Write ``graph``, a variant of a model beside ``target`` some of whose layers were written anew.

    Weights whose bytes lie in one run in a data file of the model are shared, whatever larger weight they are a part
    of; ``target.data`` gets the others. ``check`` asks onnx.checker, to whom hard links are an attack.
    """
    data = DataFile(target.with_name(target.name + ".data"))
    for tensor in constants(graph):
        if isinstance(tensor._values, LazyWeight):
            weight = tensor._values.weight
            place = None if weight.nbytes < INLINE_BYTES else place_in(target.parent, weight.load())
            if place is None:
                data.hold(tensor, weight)
            else:
                tensor._values = ExternalValues(external(tensor.name, weight, *place), target.parent)
    save = _save_checked if check else save_variant
    data.write(lambda: save(graph, target))


def _save_checked(graph: gs.Graph, target: Path) -> None:
    save_variant(graph, target)
    _check_valid(target)


def _check_valid(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the graph would be no valid ONNX: {reason}", hint="check the model with onnx.checker"
        ) from error


def save_variant(graph: gs.Graph, target: Path) -> None:
    """Write ``graph`` as ``target``; its large weights lie in a data file beside it already."""
    _forget_shapes(graph)
    called = {(node.domain, node.op) for node in every_node(graph)}
    graph.functions = [function for function in graph.functions if (function.domain, function.name) in called]
    model = gs.export_onnx(graph, do_type_check=False, opset_imports=_used_opsets(graph))
    model.producer_name = "moe-edge"
    _gather_constants(model.graph)
    onnx.save(onnx.shape_inference.infer_shapes(model), target)


def _used_opsets(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """The opsets that the graph's nodes are written for; the standard one is always there."""
    used = {"", *(node.domain or "" for node in every_node(graph))}
    known = {entry.domain: entry.version for entry in graph.import_domains or ()}
    known.setdefault("", graph.opset)
    return [onnx.helper.make_opsetid(domain, known.get(domain, 1)) for domain in sorted(used)]


def _gather_constants(graph: onnx.GraphProto) -> None:
    """Constants that bodies read stand in the outermost graph, once; graphsurgeon writes them into every body."""
    known = {tensor.name for tensor in graph.initializer}
    for body in list(every_graph(graph))[1:]:
        inner = list(body.initializer)
        del body.initializer[:]
        graph.initializer.extend(tensor for tensor in inner if tensor.name not in known)
        known |= {tensor.name for tensor in inner}


def copy_weights(source: Path, target: Path) -> None:
    """Copy the external data files that the ONNX file ``source`` names into directory ``target``, under their names."""
    for location in locations_of(_parse(source)):
        path = inside(target, location, target / MODEL)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(inside(source.parent, location, source), path)


def link_weights(graph: gs.Graph, source: Path, target: Path) -> None:
    """Put the graph's external data files into ``target``, without a copy where the file system allows."""
    stored = (tensor._values for tensor in constants(graph))
    locations = {location_of(values.tensor) for values in stored if isinstance(values, ExternalValues)}
    for location in sorted(locations):
        original, link = inside(source, location, source / MODEL), inside(target, location, target / MODEL)
        if link.exists():
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(original.resolve(), link)
        except OSError:  # another file system
            shutil.copyfile(original, link)


def _forget_shapes(graph: gs.Graph) -> None:
    """Intermediate shapes name the old E and K; they are inferred anew."""
    ends = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for node in graph.nodes:
        for tensor in node.outputs:
            if isinstance(tensor, gs.Variable) and id(tensor) not in ends:
                tensor.shape, tensor.dtype = None, None
