"""Recognise MoE blocks. One file a form, each with ``anchors(graph)`` and ``read(anchor, name, weights)``.

A reader never changes the graph. What no reader takes, but looks like a router, is a ``Refusal``: nothing is ever
silently unpruned.
"""

import dataclasses
from pathlib import Path
from types import ModuleType

import onnx_graphsurgeon as gs

from graph_passes.block import FormError, MoEBlock, Refusal, place_of
from graph_passes.readers import batched_mm, experts_node
from graph_passes.routers import Weights
from graph_passes.walk import SHAPE_ONLY, is_weight, producer, source

READERS: tuple[ModuleType, ...] = (experts_node, batched_mm)
"""Most specific first."""

ELEMENTWISE = frozenset(
    {"Abs", "Add", "Clip", "Div", "Exp", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Relu", "Sigmoid"}
    | {"Softmax", "Softplus", "Sqrt", "Sub", "Tanh", "Where"}
)
"""What a router may do to its logits before it ranks them."""

FURTHEST_ROUTER = 40
"""Values that are looked at between a TopK and its projection."""

FOREIGN_MOE_OPS = ("MoE", "QMoE", "TRT_MoE")
"""Fused MoE ops of other tools, which no reader takes yet."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was found in a graph: blocks in graph order, and every MoE layer that was not recognised."""

    blocks: tuple[MoEBlock, ...]
    refusals: tuple[Refusal, ...]


def read_blocks(graph: gs.Graph, directory: Path) -> Reading:
    """Every MoE block of ``graph`` (in topological order), whose weights lie in ``directory``."""
    weights = Weights(directory)
    found: list[tuple[int, MoEBlock | Refusal]] = []
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    anchors = [(order[id(node)], reader, node) for reader in READERS for node in reader.anchors(graph)]
    for position, reader, node in sorted(anchors, key=lambda item: item[0]):
        found.append((position, _try(reader, node, f"moe.{len(found)}", weights)))
    blocks = tuple(item for _, item in found if isinstance(item, MoEBlock))
    refusals = [item for _, item in found if isinstance(item, Refusal)]
    return Reading(blocks, (*refusals, *_leftovers(graph, blocks, refusals)))


def _try(reader: ModuleType, node: gs.Node, name: str, weights: Weights) -> MoEBlock | Refusal:
    try:
        block: MoEBlock = reader.read(node, name, weights)
        _check_agreement(block, node)
    except FormError as reason:
        return Refusal(reader.FORM, reason.reason, reason.node)
    return block


def _check_agreement(block: MoEBlock, node: gs.Node) -> None:
    """Router and experts are of one size: an exporter that lost experts is found here."""
    router, experts = block.router.weight_EH.shape, block.experts.up_EHF.shape
    if router != experts[:2]:
        raise FormError(
            f"the router chooses among {router[0]} experts that read {router[1]} channels, "
            f"there are {experts[0]} that read {experts[1]}",
            node,
        )
    if not 1 <= block.router.top_k <= block.num_experts:
        raise FormError(f"the router selects K={block.router.top_k} of {block.num_experts} experts", node)


def _leftovers(graph: gs.Graph, blocks: tuple[MoEBlock, ...], refusals: list[Refusal]) -> list[Refusal]:
    """MoE ops and routers that belong to no recognised block."""
    known = {id(source(block.router.ids)) for block in blocks}
    found = []
    for node in graph.nodes:
        if node.op in FOREIGN_MOE_OPS:
            found.append(Refusal("any", "no reader takes this fused op", place_of(node)))
        elif node.op == "TopK" and id(node.outputs[1]) not in known and not refusals and _looks_like_router(node):
            found.append(Refusal("any", "experts are routed here, in a form that no reader knows", place_of(node)))
    return found


def _looks_like_router(topk: gs.Node) -> bool:
    """Whether a TopK whose ids are used ranks some function of a projection by a constant matrix."""
    if not topk.outputs[1].outputs:
        return False
    front, seen = [topk.inputs[0]], 0
    while front and seen < FURTHEST_ROUTER:
        node, seen = producer(front.pop()), seen + 1
        if node is not None and node.op in ("Gemm", "MatMul") and is_weight(node.inputs[1], 2):
            return True
        if node is not None and node.op in SHAPE_ONLY | ELEMENTWISE:
            front.extend(node.inputs)
    return False
