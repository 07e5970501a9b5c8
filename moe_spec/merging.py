"""The arithmetic of merging, in float64: neurons in the order in which two experts come nearest, then a weighted mean.

The order of an expert's F neurons means nothing: permuting them in every weight leaves what it computes as it is. Two
experts can be averaged neuron by neuron once they agree on an order.

Checkpoints and graphs are merged by the same steps on the same numbers in the same order, so the bytes are the same.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.layer_plan import LayerPlan

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

Read = Callable[[str, int], Array]
"""``read(name, expert)``: a weight of one expert, its F neurons on axis 0 where it has neurons."""


class Merging:
    """The experts of one layer, merged as a plan says: a weight at a time, and of that one expert after the other."""

    def __init__(self, plan: LayerPlan, neurons: Sequence[str], read: Read) -> None:
        """Nothing is read yet.

        Args:
            plan: of the layer.
            neurons: names of the weights that have neurons; a neuron is all that goes into it and all that comes out.
            read: gives the weights of the experts as they were.
        """
        self._neurons, self._read, self._align = neurons, read, plan.align
        self._merge_of = dict(zip(plan.keep, plan.merge, strict=True))
        self._orders = functools.cache(self._find_orders)

    def mean(self, name: str, survivor: int) -> Doubles:
        """What weight ``name`` of ``survivor`` becomes, its neurons on axis 0 if it has any."""
        members = self._merge_of[survivor].weighted
        return weighted_mean((weight, self.aligned(name, survivor, expert)) for weight, expert in members)

    def aligned(self, name: str, survivor: int, expert: int) -> Array:
        """Weight ``name`` of ``expert``, its neurons in the order in which it is averaged with ``survivor``."""
        weight = self._read(name, expert)
        order = self._orders(survivor).get(expert) if self._align and name in self._neurons else None
        return weight if order is None else weight[order]

    def _find_orders(self, survivor: int) -> dict[int, npt.NDArray[np.intp]]:
        reference_FD = self._by_neuron(survivor)
        others = (expert for _, expert in self._merge_of[survivor].weighted if expert != survivor)
        return {expert: best_order(reference_FD, self._by_neuron(expert)) for expert in others}

    def _by_neuron(self, expert: int) -> Doubles:
        weights = (self._read(name, expert) for name in self._neurons)
        return np.concatenate([weight.astype(np.float64).reshape(len(weight), -1) for weight in weights], axis=1)


def weighted_mean(weighted: Iterable[tuple[float, Array]]) -> Doubles:
    """Divided last: whole weights of equal float32 values then give that value exactly.

    >>> weighted_mean([(3.0, np.float32([1, 2])), (1.0, np.float32([5, 2]))])
    array([2., 2.])
    """
    pairs = iter(weighted)
    divisor, first = next(pairs)
    total = divisor * first.astype(np.float64)
    for weight, values in pairs:
        divisor += weight
        total += weight * values.astype(np.float64)
    return np.asarray(total / divisor)


def best_order(reference_FD: Doubles, other_FD: Doubles) -> npt.NDArray[np.intp]:
    """The order of the neurons of ``other`` that agrees most with those of ``reference``.

    ``<Win_J, P Win_y> + <Wout_J, Wout_y P^T>`` is the sum of the inner products of the pairs that the permutation P
    makes, where a row is all that goes into a neuron and all that comes out. The best of all permutations, by linear
    assignment: O(F^3) time, seconds for F = 2048, and F^2 float64 of memory. Needs scipy.

    >>> best_order(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0, 1.0], [3.0, 0.0]])).tolist()
    [1, 0]
    """
    from scipy.optimize import linear_sum_assignment  # takes a while to import

    _, order = linear_sum_assignment(reference_FD @ other_FD.T, maximize=True)
    return np.asarray(order)
