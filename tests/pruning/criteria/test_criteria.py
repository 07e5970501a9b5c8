"""What the criteria make of the same statistics."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_spec.errors import UserError
from moe_spec.statistics import KEYS, LayerStatistics
from pruning.budget.ranked import RankedLayer
from pruning.budget.scopes import SCOPES
from pruning.criteria import (
    CHANGE_CRITERIA,
    CRITERIA,
    DATA_FREE_CRITERIA,
    NAEE,
    PAPERS,
    WEIGHT_CRITERIA,
    by_statistics,
)
from pruning.criteria.moments import SUMS, Moment
from pruning.merging.mergers import MERGERS

NORMS = (1, 2, 6)
GATES = ({0: 0.9, 1: 0.1}, {0: 0.8, 1: 0.2}, {1: 0.5, 2: 0.5}, {0: 0.6, 1: 0.4})
CHANGES = (0.1, 0.1, 0.5, 0.2)
"""Three experts with constant output norms; four tokens with renormalised top-2 gates, and how far the experts turn
each token's hidden state."""


def layer(norms=NORMS, gates=GATES, changes=CHANGES):
    """Expert e always gives (norm, 0); the router's scores are the gates."""
    sizes = {"E": len(norms), "H": 2}
    sums = {key: np.zeros([sizes[axis] for axis in row.axes]) for key, row in KEYS.items()}
    for token, change in zip(gates, changes, strict=True):
        for expert, gate in token.items():
            norm = norms[expert]
            for (alpha, beta), key in SUMS.items():
                sums[key][expert] += gate**alpha * norm**beta
            sums["probability"][expert] += gate
            sums["gated_norm_change"][expert] += gate * norm * change
            sums["output"][expert] += (norm, 0)
            sums["output_squared"][expert] += (norm**2, 0)
    return LayerStatistics("mlp", len(norms), 2, len(gates), sums)


@pytest.mark.parametrize(
    ("criterion", "scores", "first_to_go"),
    [
        ("frequency", (3, 4, 1), 2),
        ("seer-actual", (3, 4, 1), 2),
        ("gate-mass", (2.3, 1.2, 0.5), 2),
        ("seer-soft", (2.3, 1.2, 0.5), 2),
        ("ean", (3, 8, 6), 0),
        ("man", (1, 2, 6), 0),
        ("msan", (1, 4, 36), 0),
        ("task", (2.3, 2.4, 3.0), 0),
        ("task-squared", (1.81, 1.84, 9.0), 0),
        ("reap", (0.7667, 0.6, 3.0), 1),
        ("easy-ep", (0.29, 0.72, 1.5), 0),
        ("mone", (0, 0, 0), 0),
    ],
)
def test_one_fixture_tells_the_criteria_apart(criterion, scores, first_to_go):
    found = CRITERIA[criterion](layer())
    np.testing.assert_allclose(found, scores, atol=5e-5)
    assert found.dtype == np.float64
    assert found.argmin() == first_to_go


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_expert_that_was_never_selected_scores_zero_unless_by_what_the_router_gave_it(criterion):
    statistics = layer(norms=(1, 2, 6, 9))
    statistics.sums["probability"][:] += 0.25  # a softmax leaves nobody out
    dead = CRITERIA[criterion](statistics)
    assert dead[3] == (0.25 if criterion == "seer-soft" else 0)
    assert np.isfinite(dead).all()


def shuffled(statistics, order):
    """Expert ``j`` afterwards is expert ``order[j]`` before."""
    sums = dict(statistics.sums)
    for key, values in sums.items():
        sums[key] = values[order][:, order] if KEYS[key].axes == "EE" else values[order]
    return dataclasses.replace(statistics, sums=sums)


@pytest.mark.parametrize("criterion", [*CRITERIA, "s(2,1,1)"])
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(6)))
def test_renaming_experts_renames_their_scores(criterion, seed, order):
    rng = np.random.default_rng(seed)
    sizes = {"E": 6, "H": 3}
    sums = {key: rng.random([sizes[axis] for axis in row.axes]) for key, row in KEYS.items()}
    statistics = LayerStatistics("mlp", 6, 2, 9, sums | {"tokens": rng.integers(0, 9, 6).astype(np.float64)})
    score = by_statistics(criterion)
    assert score is not None
    np.testing.assert_array_equal(score(shuffled(statistics, order)), score(statistics)[list(order)])


@pytest.mark.parametrize(("text", "same"), [("s(1,1,1)", "reap"), ("s(0, 2, 2)", "task-squared"), ("s(1,0,2)", "msan")])
def test_any_member_of_the_family_is_a_criterion(text, same):
    assert by_statistics(text) == CRITERIA[same]


def test_a_power_counts_tokens_as_often_as_it_says():
    np.testing.assert_allclose(Moment(2, 1, 1)(layer()), (2.3 / 9, 2.4 / 16, 3.0))


def test_what_is_no_member_of_the_family_is_no_criterion():
    assert [by_statistics(text) for text in ("s(1,1)", "s(1,-1,1)", "s(1,1,1", "random", "t(1,1,1)")] == [None] * 5


def test_a_sum_that_no_statistics_hold_is_refused_with_those_that_they_do():
    with pytest.raises(UserError) as caught:
        by_statistics("s(1,1,3)")
    assert caught.value.what == (
        "s(1,1,3) needs the sum of g^1 ||f||^3 over an expert's tokens, which no statistics hold"
    )
    assert caught.value.hint == "the pairs alpha,beta are: 0,0 1,0 2,0 0,1 0,2 1,1 2,2"


def test_mone_weighs_what_varies():
    """Outputs (1, 3) and (3, 5) vary by 1 in each unit; (2, 2) does not vary, however often it is selected."""
    sums = {
        "tokens": np.array([2.0, 5.0, 0.0]),
        "gate": np.array([0.75, 4.0, 0.0]),
        "output": np.array([[4.0, 8.0], [10.0, 10.0], [0.0, 0.0]]),
        "output_squared": np.array([[10.0, 34.0], [20.0, 20.0], [0.0, 0.0]]),
    }
    found = CRITERIA["mone"](LayerStatistics("mlp", 3, 2, 7, sums))
    np.testing.assert_allclose(found, (np.sqrt(2) * 0.75, 0, 0))


def test_mone_takes_rounding_for_no_variance():
    values = np.full(3, 0.1)
    sums = {"tokens": [3.0], "gate": [1.0], "output": [[values.sum()]], "output_squared": [[(values**2).sum() - 1e-17]]}
    statistics = LayerStatistics("mlp", 1, 1, 3, {key: np.array(numbers) for key, numbers in sums.items()})
    assert CRITERIA["mone"](statistics)[0] < 1e-8


ROWS_A = ((0.50, 0.45, 0.05), (0.50, 0.45, 0.05), (0.10, 0.10, 0.80))
ROWS_B = ((0.98, 0.01, 0.01), (0.90, 0.06, 0.04), (0.34, 0.33, 0.33))
"""Softmax scores of two layers with top-1 routers."""


def top_1(rows, name):
    probability_TE = np.array(rows)
    selected_TE = np.eye(3)[probability_TE.argmax(axis=1)]
    sums = {
        "tokens": selected_TE.sum(axis=0),
        "gate": (selected_TE * probability_TE).sum(axis=0),
        "probability": probability_TE.sum(axis=0),
    }
    return LayerStatistics(name, 3, 1, 3, sums)


def dropped(criterion, keep, scope, top_k=1):
    layers = [
        RankedLayer(one.name, top_k, None, CRITERIA[criterion](one)) for one in (top_1(ROWS_A, "A"), top_1(ROWS_B, "B"))
    ]
    counts = SCOPES[scope].spread(layers, keep)
    return [one.plan(count).dropped for one, count in zip(layers, counts, strict=True)]


@pytest.mark.parametrize(
    ("criterion", "a", "b"),
    [
        ("seer-actual", (2, 0, 1), (3, 0, 0)),
        ("seer-soft", (1.10, 1.00, 0.90), (2.22, 0.40, 0.38)),
        ("gate-mass", (1.0, 0, 0.8), (2.22, 0, 0)),
    ],
)
def test_three_readings_of_seer_counts(criterion, a, b):
    np.testing.assert_allclose(CRITERIA[criterion](top_1(ROWS_A, "A")), a)
    np.testing.assert_allclose(CRITERIA[criterion](top_1(ROWS_B, "B")), b)


@pytest.mark.parametrize(
    ("criterion", "gone"),
    [("seer-soft", [(2,), (2,)]), ("seer-actual", [(1,), (2,)]), ("gate-mass", [(1,), (2,)])],
)
def test_the_readings_drop_other_experts(criterion, gone):
    assert dropped(criterion, keep=2, scope="layer") == gone


@pytest.mark.parametrize(("top_k", "gone"), [(1, [(), (1, 2)]), (2, [(2,), (2,)])])
def test_a_global_budget_of_soft_counts_stops_at_k(top_k, gone):
    assert dropped("seer-soft", keep=2, scope="global", top_k=top_k) == gone


def test_random_repeats_with_its_seed():
    first, second, other = (DATA_FREE_CRITERIA["random"](8, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_every_criterion_and_merger_has_a_paper_but_the_baselines():
    names = {NAEE}.union(CRITERIA, WEIGHT_CRITERIA, CHANGE_CRITERIA, DATA_FREE_CRITERIA, MERGERS)
    assert names - set(PAPERS) == {"frequency", "random"}
    assert set(PAPERS) <= names
