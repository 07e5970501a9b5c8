"""A float32 model in float16 or bfloat16, with islands of float32 where rounding would tell.

Which op computes in what is a table (`kinds`); who reads what is looked at node by node (`assign`), so that types are
exact where networks are strongly typed; and casts stand where formats meet, one for each value (`rewrite`).
"""

from collections.abc import Sequence
from pathlib import Path

import onnx_graphsurgeon as gs

from graph_passes.casts.assign import Assignment, Formats
from graph_passes.casts.regions import find_regions
from graph_passes.casts.rewrite import insert_casts
from graph_passes.graph.walk import constants
from graph_passes.model_file import load_graph
from graph_passes.proof.retype import WIDENED, declared


def is_float32(graph: gs.Graph) -> bool:
    """Whether nothing that ``graph`` is given or holds is of halves."""
    return not any(declared(tensor) in WIDENED for tensor in (*graph.inputs, *constants(graph)))


def cast_graph(source: Path, formats: Formats, plain: Sequence[str] = ()) -> gs.Graph:
    """The graph of the ONNX file ``source``, which is float32, in ``formats``; its weights are cast when it is saved.

    ``plain`` names the MoE layers that have become FFNs.

    Raises:
        UserError: a layer whose router is not recognised, or an op whose types are not known.
    """
    graph = load_graph(source)
    regions = find_regions(graph, source.parent, plain)
    insert_casts(Assignment(graph, source.parent, regions, formats), source.parent)
    return graph
