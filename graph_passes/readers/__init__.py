"""Recognise MoE blocks. One file a form, each with ``FORM``, ``LOOKS_FOR``, ``anchors`` and ``read``.

``anchors(graph)`` gives the nodes at which a block of this form may be found, ``read(anchor, name, weights)`` the
block or a ``FormError``. A reader never changes the graph. What no reader takes, but looks like a router, is
``Unrecognised``: nothing is ever silently unpruned.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import onnx_graphsurgeon as gs

from graph_passes.graph.qdq import bypassed
from graph_passes.readers import (
    batched_mm,
    dense,
    dispatch,
    experts_node,
    gather,
    grouped,
    masked_loop,
    moe,
    nonzero,
    qmoe,
    sorted_runs,
    stacked,
    trt_moe,
)
from graph_passes.readers.agreement import agree
from graph_passes.readers.bodies import Body, find_bodies
from graph_passes.readers.sites import Site, find_sites, projection_before
from graph_passes.record.block import FormError, MoEBlock, Refusal, Unrecognised, place_of
from graph_passes.routers import Weights

READERS: tuple[ModuleType, ...] = (
    experts_node,
    moe,
    qmoe,
    trt_moe,
    batched_mm,
    grouped,
    sorted_runs,
    nonzero,
    dispatch,
    stacked,
    masked_loop,
    dense,
    gather,
)
"""Most specific first: where two take the same block, the first has it."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was found in a graph: blocks in graph order, and every MoE layer that was not recognised."""

    blocks: tuple[MoEBlock, ...]
    unrecognised: tuple[Unrecognised, ...]


@dataclasses.dataclass(frozen=True)
class _Failure:
    """One reader's refusal of one anchor, at ``position`` in the graph."""

    position: int
    refusal: Refusal


def read_blocks(graph: gs.Graph, directory: Path) -> Reading:
    """Every MoE block of ``graph`` (in topological order), whose weights lie in ``directory``."""
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    with bypassed(graph):
        blocks, failures = _try_all(graph, order, Weights(directory))
        sites, bodies = find_sites(graph, order), find_bodies(graph, order)
    return Reading(tuple(blocks), tuple(_unrecognised(blocks, failures, sites, bodies, order)))


def _try_all(graph: gs.Graph, order: Mapping[int, int], weights: Weights) -> tuple[list[MoEBlock], list[_Failure]]:
    """Blocks in graph order, each once; and what failed."""
    anchors = [(order[id(node)], reader, node) for reader in READERS for node in reader.anchors(graph)]
    read: dict[int, list[MoEBlock]] = {}
    failures = []
    for position, reader, node in sorted(anchors, key=lambda item: item[0]):
        result = _try(reader, node, "", weights)
        if isinstance(result, Refusal):
            failures.append(_Failure(position, result))
        else:
            router = projection_before(result.router.logits) or result.out
            read.setdefault(id(router), []).append(result)
    return _named_apart([block for blocks in read.values() for block in _most_specific(blocks)]), failures


def _most_specific(blocks: Sequence[MoEBlock]) -> list[MoEBlock]:
    """Of blocks behind one router those of the first reader; the others may end the same layer at another node."""
    forms = [reader.FORM for reader in READERS]
    first = min((block.form for block in blocks), key=forms.index)
    return list({id(block.out): block for block in blocks if block.form == first}.values())


def _named_apart(blocks: Sequence[MoEBlock]) -> list[MoEBlock]:
    """Every layer with a name of its own.

    ``moe.<index>`` where the graph has lost it; layers that share all weights have the name of one, so the second is
    called ``<name>_2``.
    """
    counts: Counter[str] = Counter()
    named = []
    for index, block in enumerate(blocks):
        block = block if block.name else dataclasses.replace(block, name=f"moe.{index}")
        counts[block.name] += 1
        number = counts[block.name]
        named.append(block if number == 1 else dataclasses.replace(block, name=f"{block.name}_{number}"))
    return named


def _try(reader: ModuleType, node: gs.Node, name: str, weights: Weights) -> MoEBlock | Refusal:
    try:
        block = agree(reader.read(node, name, weights), node)
    except FormError as reason:
        return Refusal(reader.FORM, reason.reason, reason.node)
    except RecursionError:
        return Refusal(reader.FORM, "its ops are nested deeper than any exporter nests them", place_of(node))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if node.domain in (None, ""):
            raise
        # the checker knows no schema of contrib ops: their inputs and attributes may be anything
        return Refusal(reader.FORM, f"the node is malformed: {type(error).__name__}: {error}", place_of(node))
    return block


def _unrecognised(
    blocks: Sequence[MoEBlock],
    failures: Sequence[_Failure],
    sites: Sequence[Site],
    bodies: Sequence[Body],
    order: Mapping[int, int],
) -> list[Unrecognised]:
    """Routers that lead into no block, each with what every reader said of the nodes up to the next router.

    A failure that belongs to no router, and to no block that another reader took, stands for a layer of its own.
    """
    projections = [projection_before(block.router.logits) for block in blocks]
    spans = [
        (order[id(projection)], order[id(block.out.inputs[0])])
        for block, projection in zip(blocks, projections, strict=True)
        if projection is not None
    ]
    open_failures = [item for item in failures if not any(start <= item.position <= end for start, end in spans)]
    claimed = {id(projection) for projection in projections}
    found = []
    ends = [*(site.position for site in sites[1:]), len(order)]
    for site, end in zip(sites, ends, strict=False):
        own = [item for item in open_failures if site.position <= item.position < end]
        if id(site.projection) not in claimed:
            inner = [body.refusal for body in bodies if site.position <= body.position < end]
            found.append(_site_refused(site, [*(item.refusal for item in own), *inner]))
            bodies = [body for body in bodies if body.refusal not in inner]
            open_failures = [item for item in open_failures if item not in own]
    certain = [body.refusal for body in bodies if body.routes]
    alone = [*(item.refusal for item in open_failures), *certain]
    return [*found, *(Unrecognised(f"at {refusal.node}", refusal.node, (refusal,)) for refusal in alone)]


def _site_refused(site: Site, refusals: Sequence[Refusal]) -> Unrecognised:
    """Every reader's word on one router: those that came upon something of their form first."""
    place = place_of(site.ranking)
    tried = {refusal.form for refusal in refusals}
    rest = [
        Refusal(reader.FORM, f"no {reader.LOOKS_FOR} follows the router", place)
        for reader in READERS
        if reader.FORM not in tried
    ]
    return Unrecognised(site.layer, place, (*refusals, *rest))
