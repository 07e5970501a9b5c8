import itertools

import numpy as np
import pytest

from moe_spec.layer_plan import LayerPlan, Merge
from moe_spec.merging import Merging, best_order, weighted_mean

J = {"up": np.eye(2), "down": np.array([[1.0], [2.0]])}
Y = {"up": np.eye(2)[::-1], "down": np.array([[2.0], [1.0]])}
"""Two experts of two neurons, in another order; each has one output."""


def by_neuron(weights):
    return np.concatenate([weights["up"], weights["down"]], axis=1)


def merged(align: bool):
    plan = LayerPlan("layer", 2, 1, (0,), merge=(Merge((0, 1), (1, 1)),), align=align)
    merging = Merging(plan, ("up", "down"), lambda name, expert: (J, Y)[expert][name])
    return {name: merging.mean(name, 0) for name in J}


def test_the_worked_example():
    agreement_FF = by_neuron(J) @ by_neuron(Y).T
    assert (agreement_FF.trace(), np.fliplr(agreement_FF).trace()) == (4, 7)
    assert best_order(by_neuron(J), by_neuron(Y)).tolist() == [1, 0]


def test_an_average_without_alignment_computes_something_else():
    def output(weights):
        return (weights["down"].T @ weights["up"] @ np.array([1.0, 0.0])).item()

    assert (output(J), output(merged(align=False)), output(merged(align=True))) == (1, 1.5, 1)


def test_the_assignment_is_the_best_of_all():
    reference_FD, other_FD = np.random.default_rng(0).standard_normal((2, 4, 6))
    agreement_FF = reference_FD @ other_FD.T
    best = max(agreement_FF[range(4), list(order)].sum() for order in itertools.permutations(range(4)))
    found = agreement_FF[range(4), best_order(reference_FD, other_FD)].sum()
    np.testing.assert_allclose(found, best, rtol=1e-12)


def test_what_weighs_nothing_is_not_read():
    plan = LayerPlan("layer", 3, 1, (1,), merge=(Merge((0, 1, 2), (0, 2, 1)),), align=True)
    read = []

    def weight(name, expert):
        read.append(expert)
        return np.full((2, 2), float(expert))

    np.testing.assert_array_equal(Merging(plan, ("up",), weight).mean("up", 1), np.full((2, 2), 4 / 3))
    assert 0 not in read


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_mean_of_equal_values_is_that_value(dtype):
    value = np.random.default_rng(0).standard_normal(100).astype(dtype)
    mean = weighted_mean([(0.3, value), (7.1, value), (1e-3, value)])
    np.testing.assert_array_equal(mean.astype(dtype), value)
