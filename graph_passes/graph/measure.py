"""How large a graph is: what a pass did, in nodes and bytes."""

import dataclasses
from pathlib import Path

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import constants, every_node
from graph_passes.weights.stored import of_constant
from moe_spec.manifest import PassEntry


@dataclasses.dataclass(frozen=True)
class Size:
    """Nodes, those in bodies included, and the bytes of every constant that one of them reads."""

    nodes: int
    bytes: int


def measure(graph: gs.Graph, directory: Path) -> Size:
    """The size of ``graph``, whose weights lie in ``directory``.

    Raises:
        UserError: a weight is missing, cut, or lies outside ``directory``.
    """
    return Size(
        sum(1 for _ in every_node(graph)),
        sum(of_constant(tensor, directory).nbytes for tensor in constants(graph)),
    )


def pass_entry(name: str, modified: bool, before: Size, after: Size) -> PassEntry:
    """What pass ``name`` did, as a manifest has it."""
    return PassEntry(name, modified, before.nodes, after.nodes, before.bytes, after.bytes)
