"""Looking around in a graph: the few questions that readers ask."""

import math
from collections.abc import Container, Iterator, Sequence
from typing import TypeGuard

import numpy as np
import onnx_graphsurgeon as gs

SHAPE_ONLY = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Ops that move no value to another token, expert or channel where MoE blocks use them."""


def every_node(graph: gs.Graph) -> Iterator[gs.Node]:
    """The nodes of ``graph``, and those in the bodies of its control flow."""
    yield from graph.nodes
    for node in graph.nodes:
        for value in node.attrs.values():  # Node.subgraphs() says the same, and takes longer than all else here
            if isinstance(value, gs.Graph):
                yield from every_node(value)


def constants(graph: gs.Graph) -> list[gs.Constant]:
    """Every constant that a node of the graph or of a body reads, once, in the order of use."""
    found: dict[int, gs.Constant] = {}
    for node in every_node(graph):
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                found.setdefault(id(tensor), tensor)
    return list(found.values())


END = np.iinfo(np.int32).max
"""A Slice that ends here or later takes all there is."""


def is_weight(tensor: gs.Tensor | None, rank: int) -> TypeGuard[gs.Constant]:
    """Whether ``tensor`` is a constant of that rank."""
    return isinstance(tensor, gs.Constant) and len(tensor.shape) == rank


def producer(tensor: gs.Tensor | None) -> gs.Node | None:
    """The node that computes ``tensor``; None for inputs and constants."""
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None


def produced_by(tensor: gs.Tensor | None, *ops: str) -> gs.Node | None:
    """The node that computes ``tensor``, if it is one of ``ops``."""
    node = producer(tensor)
    return node if node is not None and node.op in ops else None


def operand(node: gs.Node, index: int) -> gs.Tensor | None:
    """Input ``index`` of ``node``; None where it is left out."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def source(tensor: gs.Tensor, ops: Container[str] = SHAPE_ONLY) -> gs.Tensor:
    """What ``tensor`` was before ops of ``ops`` reshaped it."""
    node = producer(tensor)
    while node is not None and node.op in ops:
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor


def sink(tensor: gs.Tensor, ops: Container[str] = SHAPE_ONLY) -> gs.Tensor:
    """What ``tensor`` becomes after its only consumers, as long as they are of ``ops``."""
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in ops:
        tensor = tensor.outputs[0].outputs[0]
    return tensor


def scalar(tensor: gs.Tensor | None) -> float | None:
    """The value of a constant with one element."""
    if not isinstance(tensor, gs.Constant) or math.prod(tensor.shape) != 1 or tensor.values.dtype.kind in "OSUc":
        return None
    return float(tensor.values.reshape(-1)[0])


def number(tensor: gs.Tensor | None) -> float | None:
    """The value of a constant with one element, casts and reshapes stepped over: unoptimised exports have many."""
    return None if tensor is None else scalar(source(tensor, SHAPE_ONLY | {"CastLike"}))


def is_whole(cut: gs.Node) -> bool:
    """Whether a Slice takes all there is along its axis, as in ``x[:]``."""
    start, end, step = (number(operand(cut, index)) for index in (1, 2, 4))
    return start == 0.0 and end is not None and end >= END and step in (None, 1.0)


def before_whole_slices(tensor: gs.Tensor) -> gs.Tensor:
    """``tensor`` before Slices that take all there is."""
    tensor = source(tensor, {"Identity"})
    node = produced_by(tensor, "Slice")
    while node is not None and is_whole(node):
        tensor = source(node.inputs[0], {"Identity"})
        node = produced_by(tensor, "Slice")
    return tensor


def split_constant(node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """``(x, c)`` of a binary node with one scalar constant ``c``, on either side."""
    for this, other in ((0, 1), (1, 0)):
        value = scalar(node.inputs[other])
        if value is not None and not isinstance(node.inputs[this], gs.Constant):
            return node.inputs[this], value
    return None


def replace_reads(old: gs.Tensor, new: gs.Tensor, except_by: Sequence[gs.Node] = ()) -> None:
    """Let every consumer of ``old`` but those in ``except_by`` read ``new`` instead; outputs of the graph stay."""
    for node in list(old.outputs):
        if all(node is not other for other in except_by):
            for index, tensor in enumerate(node.inputs):
                if tensor is old:
                    node.inputs[index] = new


def replace_uses(graph: gs.Graph, old: gs.Tensor, new: gs.Tensor, except_by: Sequence[gs.Node] = ()) -> None:
    """Let every consumer of ``old`` but those in ``except_by``, and the graph's outputs, read ``new`` instead."""
    replace_reads(old, new, except_by)
    for index, tensor in enumerate(graph.outputs):
        if tensor is old:
            name, new.name = old.name, old.name
            old.name = f"{name}.replaced"
            new.dtype, new.shape = old.dtype, old.shape
            graph.outputs[index] = new
