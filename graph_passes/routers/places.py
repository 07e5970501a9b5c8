"""Read how many tokens an expert takes: places counted by CumSum over a one-hot mask, and compared with a limit.

::

    place <= limit      place < limit      Equal(place, [0 ... limit - 1])      OneHot(place, limit)      of
    place = CumSum(mask) [- 1] [* mask] [+ the number of first choices]

The axis of the CumSum, and the shape that its input was given, say which tokens form a sequence (GShard's group). All
first choices come before second ones where slots stand in front of tokens, or the number of first choices is added.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, operand, produced_by, producer, scalar, source
from graph_passes.record.block import Capacity, FormError
from graph_passes.routers.constants import constant_value, numbers, whole_number
from graph_passes.routers.hits import ids_of
from graph_passes.routers.ranking import read_ranking

TURNS = SHAPE_ONLY | {"Transpose"}
SHAPES = frozenset({"Cast", "Concat", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Unsqueeze"})
"""Ops between a Shape and the shape that something gets."""

DEEPEST = 8
"""Nodes that are looked at between a comparison and the CumSum that it compares."""

SAME_RANK = frozenset({"Add", "Cast", "Identity", "LayerNormalization", "MatMul", "Sigmoid", "Softmax"})
"""Ops whose results have as many axes as what they read first, as routers use them."""

FURTHEST_SHAPE = 12
"""Values that are looked at between a Reshape and the Shape behind its operand."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """``CumSum(mask) + shift``.

    Attributes:
        running: the CumSum.
        shift: what is added to it.
        outside: the place of an expert that is not chosen, where a mask multiplied the count.
        after_first: whether the places of first choices are counted before.
    """

    running: gs.Node
    shift: int = 0
    outside: int | None = None
    after_first: bool = False


@dataclasses.dataclass(frozen=True)
class Limit:
    """A comparison that is 1 where a token has a place.

    Attributes:
        capacity: the limit, and which tokens are counted together.
        ids: of the mask whose places are counted.
        implied_ids: ``ids`` where the comparison is 0 for experts that are not chosen.
    """

    capacity: Capacity
    ids: gs.Tensor
    implied_ids: tuple[gs.Tensor, ...]


def is_place(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` counts places; an Equal with it is no mask of ids."""
    return _read_place(tensor) is not None


def read_limit(node: gs.Node) -> Limit | None:
    """The limit that ``node`` compares places with; None where it does no such thing.

    Raises:
        FormError: it compares places with something that is no limit.
    """
    if node.op not in ("LessOrEqual", "Less", "Equal", "OneHot"):
        return None
    place = _read_place(node.inputs[0])
    if place is None:
        return None
    bound, extra, lowest = _bound(node)
    limit = _shifted(bound, extra - place.shift, node)
    if lowest > 1 + place.shift:
        raise FormError("the first place of an expert is left empty", node)
    ids = _queue_ids(place.running)
    excludes = place.outside is not None and node.op in ("Equal", "OneHot") and place.outside < lowest
    capacity = Capacity(limit, _sequence(place.running), by_slot=place.after_first or _slots_first(place.running))
    return Limit(capacity, ids, (ids,) if excludes else ())


def capacity_of(limits: Sequence[Limit], node: gs.Node) -> Capacity | None:
    """The one capacity that all ``limits`` say; None where there are none.

    Raises:
        FormError: they differ.
    """
    if not limits:
        return None
    first = limits[0].capacity
    for other in (limit.capacity for limit in limits[1:]):
        same = first.limit is other.limit or scalar(first.limit) == scalar(other.limit) is not None
        if not same or first.sequence is not other.sequence:
            raise FormError("choices are dropped by different capacities", node)
    return dataclasses.replace(first, by_slot=any(limit.capacity.by_slot for limit in limits))


def _read_place(tensor: gs.Tensor, depth: int = DEEPEST) -> _Place | None:
    tensor = source(tensor, TURNS)
    node = producer(tensor)
    if node is None or depth == 0:
        return None
    depth -= 1
    if node.op == "CumSum":
        plain = not node.attrs.get("exclusive", 0) and not node.attrs.get("reverse", 0)
        return _Place(node) if plain and _hits_of(node.inputs[0]) is not None else None
    if node.op in ("ReduceSum", "ReduceMax"):
        inner = produced_by(source(node.inputs[0], TURNS), "Mul", "Sub")
        return None if inner is None else _read_place(inner.outputs[0], depth)
    if node.op == "Sub":
        inner, step = _read_place(node.inputs[0], depth), whole_number(node.inputs[1])
        if inner is None or step is None:
            return None
        outside = None if inner.outside is None else inner.outside - step
        return dataclasses.replace(inner, shift=inner.shift - step, outside=outside)
    if node.op == "Mul":
        inner = _read_place(node.inputs[0], depth) or _read_place(node.inputs[1], depth)
        return None if inner is None else dataclasses.replace(inner, outside=0)
    if node.op == "Add":
        return _after_first(node, depth)
    return None


def _after_first(node: gs.Node, depth: int) -> _Place | None:
    """Places plus the number of first choices."""
    for place, total in (node.inputs, reversed(node.inputs)):
        inner, count = _read_place(place, depth), produced_by(source(total, TURNS), "ReduceSum")
        if inner is not None and count is not None and ids_of(count.inputs[0]) is not None:
            return dataclasses.replace(inner, after_first=True)
    return None


def _bound(node: gs.Node) -> tuple[gs.Tensor, int, int]:
    """(bound, what is added to it, the lowest place) such that a place is at most their sum."""
    bound = source(node.inputs[1])
    if node.op == "LessOrEqual":
        return bound, 0, 0
    if node.op in ("Less", "OneHot"):
        return bound, -1, 0
    counting = produced_by(bound, "Range")
    if counting is not None:
        first = whole_number(counting.inputs[0])
        if first is None or constant_value(counting.inputs[2]) != 1.0:
            raise FormError("places are compared with something else than 0, 1, 2 ...", node)
        return source(counting.inputs[1]), -1, first
    values = numbers(bound)
    if not values or values[0] < 0 or values != list(range(values[0], values[0] + len(values))):
        raise FormError("places are compared with something else than 0, 1, 2 ...", node)
    return gs.Constant(bound.name, np.asarray(values[-1])), 0, values[0]


def _shifted(bound: gs.Tensor, added: int, node: gs.Node) -> gs.Tensor:
    """``bound + added``: the number of places."""
    value = whole_number(bound)
    if value is not None:
        return gs.Constant(f"{bound.name}.capacity", np.asarray(value + added))
    if added or constant_value(bound) is not None:
        raise FormError("a computed capacity is off by one", node)
    return bound


def _hits_of(queue: gs.Tensor) -> gs.Tensor | None:
    """The ids whose one-hot mask is ``queue``, slots perhaps added up or put in front."""
    return ids_of(source(queue, TURNS))


def _queue_ids(running: gs.Node) -> gs.Tensor:
    ids = _hits_of(running.inputs[0])
    assert ids is not None
    return ids


def _slots_first(running: gs.Node) -> bool:
    """Whether slots were put in front of tokens before they were counted."""
    node = producer(running.inputs[0])
    while node is not None and node.op in TURNS and node.op != "Transpose":
        node = producer(node.inputs[0])
    return node is not None and node.op == "Transpose"


def _sequence(running: gs.Node) -> gs.Tensor | None:
    """The value (B, S, ...) whose sequences are counted one by one; None where all tokens are.

    Raises:
        FormError: the graph does not say which tokens form a sequence.
    """
    axis = constant_value(operand(running, 1))
    for reshape in _reshapes(running):
        shape = source(reshape.inputs[1])
        if isinstance(shape, gs.Constant):
            if len(shape.values) > 2 and shape.values[0] == 1 and axis == 1:
                return None
            continue
        shaped = _shape_source(shape)
        if shaped is not None and axis in (1, -2):
            return shaped
    ranked = read_ranking(_queue_ids(running)).ranked
    rank = _rank(ranked)
    if axis == 0 or (axis == -2 and rank == 2):
        return None
    if axis in (1, -2) and rank == 3:
        return ranked
    raise FormError("the graph does not say which tokens share the places of an expert", running)


def _rank(tensor: gs.Tensor) -> int | None:
    """The number of axes of what a router ranks, as far as the graph has it."""
    while tensor.shape is None:
        node = producer(tensor)
        if node is not None and node.op == "Gemm":
            return 2
        if node is not None and node.op == "Reshape" and isinstance(node.inputs[1], gs.Constant):
            return len(node.inputs[1].values)
        if node is None or node.op not in SAME_RANK:
            return None
        tensor = node.inputs[0]
    return len(tensor.shape)


def _reshapes(running: gs.Node) -> list[gs.Node]:
    """Every Reshape between the ids and the CumSum."""
    found, node = [], producer(running.inputs[0])
    while node is not None and node.op not in ("TopK", "ArgMax"):
        if node.op == "Reshape":
            found.append(node)
        node = producer(node.inputs[0])
    return found


def _shape_source(shape: gs.Tensor) -> gs.Tensor | None:
    """What has the leading axes that ``shape`` was made of."""
    front, seen = [shape], 0
    while front and seen < FURTHEST_SHAPE:
        node, seen = producer(front.pop(0)), seen + 1
        if node is not None and node.op == "Shape":
            return node.inputs[0]
        if node is not None and node.op in SHAPES:
            # of (batch, sequence) the second: a decoder may have its batch from the encoder's inputs
            front.extend([*node.inputs[1:], node.inputs[0]] if node.op == "Concat" else node.inputs)
    return None
