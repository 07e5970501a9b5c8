"""Before anything is read: what other tools write becomes what readers expect. One file a pass.

Inlining functions and lifting constants change how a graph is written, not what it holds. Folding conditions takes out
what can never run, so a model in which that finds something is written anew.
"""

import dataclasses
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph.checks import check_file
from graph_passes.graph.measure import measure, pass_entry
from graph_passes.simplify.conditions import fold_conditions
from graph_passes.simplify.constants import lift_constants
from graph_passes.simplify.functions import check_calls, has_calls, inline_functions
from graph_passes.simplify.importing import import_graph
from graph_passes.simplify.names import make_names_unique
from graph_passes.weights.stored import locations_of
from moe_spec.manifest import PassEntry


@dataclasses.dataclass(frozen=True)
class Simplified:
    """A graph as readers see it.

    Attributes:
        graph: it.
        passes: what was done to it for that.
        locations: the files beside the model that hold weights, also of what can never run.
    """

    graph: gs.Graph
    passes: tuple[PassEntry, ...]
    locations: tuple[str, ...]

    @property
    def reduced(self) -> bool:
        """Whether something that can never run was found, and is not in ``graph`` any more."""
        return self.passes[-1].modified


def simplify(model: onnx.ModelProto, path: Path) -> Simplified:
    """The graph of ``model`` (which changes), read from ``path``; its weights stay where they are.

    Raises:
        UserError: functions that cannot be inlined, a graph that cannot be put in order, or weights that are missing,
            cut, or outside the directory.
    """
    directory = path.parent
    _normalise(model.graph)
    inlined = has_calls(model)
    if inlined:
        check_calls(model, path)
        called = measure(import_graph(model, path), directory)
        inline_functions(model, path)
        check_file(model, path)
        _normalise(model.graph)
    locations = locations_of(model)
    graph = import_graph(model, path)
    flat = measure(graph, directory)
    folded = fold_conditions(graph)
    return Simplified(
        graph,
        (
            pass_entry("inline-functions", inlined, called if inlined else flat, flat),
            pass_entry("fold-conditions", folded, flat, measure(graph, directory)),
        ),
        locations,
    )


def _normalise(graph: onnx.GraphProto) -> None:
    make_names_unique(graph)
    lift_constants(graph)
