"""From an ONNX file to a graph in topological order whose weights can be found."""

from pathlib import Path

import onnx
import onnx.external_data_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from graph_passes.graph.order import sort_nodes
from graph_passes.graph.walk import constants
from graph_passes.weights.stored import ExternalValues
from moe_spec.errors import UserError

_MEND = "give a file that torch.onnx, `moe-edge export` or another exporter wrote"


def import_graph(model: onnx.ModelProto, path: Path) -> gs.Graph:
    """The graph of ``model``, whose weights lie beside ``path``.

    Raises:
        UserError: a cycle.
    """
    graph = gs.import_onnx(model)
    try:
        sort_nodes(graph)
    except ValueError as error:
        raise UserError(f"{path}: the graph cannot be put in order: {error}", hint=_MEND) from error
    for tensor in constants(graph):
        values = tensor._values
        if isinstance(values, LazyValues) and onnx.external_data_helper.uses_external_data(values.tensor):
            tensor._values = ExternalValues(values.tensor, path.parent)
            tensor.data_location = None  # once it is looked at, it is an array in memory
    return graph
