"""Take a product of gates apart: what weighs an expert, and the 0/1 factors that say who is chosen and who has a place.

Exporters spread ``weight * one_hot(id) * (place <= capacity) * one_hot(place)`` over Mul, Where, Einsum without a
contraction, and sums that have one term that is not 0: over the slots of (T, K, E), or over the experts at one id.
Factors that are 0 or 1 may be there twice, so the order and the way do not matter.
"""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import producer, source, split_constant
from graph_passes.routers.constants import constant_value
from graph_passes.routers.finish import over_later_axis
from graph_passes.routers.hits import ids_of
from graph_passes.routers.places import Limit, is_place, read_limit
from graph_passes.routers.scales import is_scaled

DEEPEST = 10
"""Products inside products; what a graph nests deeper is taken as a value."""


@dataclasses.dataclass(frozen=True)
class Product:
    """The factors of a product.

    Attributes:
        values: what is neither 0 nor 1: weights (T, K) or (T,), or scores (T, E).
        ids: what the one-hot masks are of, each once.
        limits: what its places are compared with.
    """

    values: tuple[gs.Tensor, ...] = ()
    ids: tuple[gs.Tensor, ...] = ()
    limits: tuple[Limit, ...] = ()

    def __mul__(self, other: "Product") -> "Product":
        ids = (*self.ids, *(one for one in other.ids if all(one is not mine for mine in self.ids)))
        return Product((*self.values, *other.values), ids, (*self.limits, *other.limits))

    @property
    def is_mask(self) -> bool:
        """Whether it is 0 or 1 everywhere."""
        return not self.values and bool(self.ids or self.limits)


def factors(tensor: gs.Tensor, depth: int = DEEPEST) -> Product:
    """What is multiplied in ``tensor``, as far as ``depth`` products deep.

    Raises:
        FormError: places are compared with something unknown.
    """
    tensor = source(tensor)
    ids = ids_of(tensor)
    if ids is not None and not is_place(ids):
        return Product(ids=(ids,))
    node = producer(tensor)
    if node is None or depth == 0:
        return Product(values=(tensor,))
    limit = read_limit(node)
    if limit is not None:
        return Product(ids=limit.implied_ids, limits=(limit,))
    if node.op == "Mul" and (split_constant(node) is not None or is_scaled(node)):
        return Product(values=(tensor,))  # scaled weights: `finish` and `scales` read that
    if node.op == "Mul" or is_outer(node):
        return factors(node.inputs[0], depth - 1) * factors(node.inputs[1], depth - 1)
    if node.op == "Where" and constant_value(node.inputs[2]) == 0.0:
        return factors(node.inputs[0], depth - 1) * factors(node.inputs[1], depth - 1)
    if node.op == "ReduceSum" and over_later_axis(node):
        inner = factors(node.inputs[0], depth - 1)
        return inner if inner.ids else Product(values=(tensor,))
    return Product(values=(tensor,))


def is_outer(node: gs.Node) -> bool:
    """Whether ``node`` is an Einsum of two operands that sums over nothing."""
    if node.op != "Einsum" or len(node.inputs) != 2:
        return False
    operands, _, result = node.attrs["equation"].replace(" ", "").partition("->")
    return set(operands) - {","} == set(result)
