"""Which nodes of a graph belong to routers, and which to experts: each has a precision of its own."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx_graphsurgeon as gs

from graph_passes.readers import read_blocks
from graph_passes.record.block import MoEBlock
from moe_spec.errors import UserError


@dataclasses.dataclass(frozen=True)
class Regions:
    """Ids of nodes; what is in neither is the rest.

    Attributes:
        routers: from the hidden state to ids and weights.
        experts: from there to the sum of their outputs.
    """

    routers: frozenset[int]
    experts: frozenset[int]


def find_regions(graph: gs.Graph, directory: Path, plain: Sequence[str]) -> Regions:
    """The regions of ``graph`` (in topological order), whose weights lie in ``directory``.

    ``plain`` names the layers that have become FFNs: nobody reads them any more, but the names of their nodes tell.

    Raises:
        UserError: a layer is not recognised, so that nobody knows what its router is.
    """
    reading = read_blocks(graph, directory)
    if reading.unrecognised:
        found = "\n".join(map(str, reading.unrecognised))
        raise UserError(
            f"a router must stay float32, and {len(reading.unrecognised)} MoE layer(s) are not recognised\n{found}",
            hint="leave --precision and --rest-precision out",
        )
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    routers = {id(node) for block in reading.blocks for node in _router(block, order)}
    experts = {id(node) for block in reading.blocks for node in _between(_borders(block), [block.out], order)}
    experts |= {id(node) for node in graph.nodes if any(node.name.startswith(f"{name}/") for name in plain)}
    return Regions(frozenset(routers), frozenset(experts - routers))


def _router(block: MoEBlock, order: dict[int, int]) -> list[gs.Node]:
    return _between([block.router.hidden], [block.router.logits, block.router.ranked, *_choice(block)], order)


def _choice(block: MoEBlock) -> list[gs.Tensor]:
    """What the router hands over; nothing where the experts' op reads the logits and routes by itself."""
    router = block.router
    slots = [] if router.slots is None else [router.slots.ids, router.slots.weights]
    return slots if router.gates is None else [*slots, router.gates]


def _borders(block: MoEBlock) -> list[gs.Tensor]:
    return [block.hidden, *(_choice(block) or [block.router.logits])]


def _between(starts: Sequence[gs.Tensor], ends: Sequence[gs.Tensor], order: dict[int, int]) -> list[gs.Node]:
    """The nodes on a way from ``starts`` to ``ends``, in order."""
    begun, found = {id(tensor) for tensor in starts}, {}
    first = min((order[id(node)] for tensor in starts for node in tensor.outputs if id(node) in order), default=0)
    front = [node for tensor in ends if id(tensor) not in begun for node in tensor.inputs]
    while front:
        node = front.pop()
        if id(node) in order and id(node) not in found and order[id(node)] >= first:
            found[id(node)] = node
            front.extend(before for tensor in _read(node) if id(tensor) not in begun for before in tensor.inputs)
    inner = []
    for node in sorted(found.values(), key=lambda node: order[id(node)]):
        if any(id(tensor) in begun for tensor in _read(node)):
            begun |= {id(tensor) for tensor in node.outputs}
            inner.append(node)
    return inner


def _read(node: gs.Node) -> list[gs.Tensor]:
    """What ``node`` reads, itself or in its bodies."""
    inner = [tensor for body in node.subgraphs() for other in body.nodes for tensor in _read(other)]
    return [*node.inputs, *inner]
