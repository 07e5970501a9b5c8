import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime import parity
from runtime.parity import Routing, compare_routing, selection_margin

PROBABILITIES = hnp.arrays(np.float64, (3, 5), elements=st.floats(0.01, 1)).map(lambda a: a / a.sum(1, keepdims=True))


def routing(gates, scores):
    return Routing(np.array(gates, np.float64), np.array(scores, np.float64))


def test_routers_that_agree_have_no_flips():
    same = routing([[0.0, 0.4, 0.6]], [[0.1, 0.4, 0.5]])
    compared = compare_routing(same, same, top_k=2)
    assert (compared.flipped.tolist(), compared.agreement.tolist()) == ([False], [1.0])
    assert (compared.weight.tolist(), compared.gate_error.tolist()) == ([0.0], [0.0])


def test_a_flip_is_a_token_whose_sets_differ_whatever_the_gates():
    mine = routing([[0.0, 0.4, 0.6], [0.5, 0.5, 0.0]], [[0.1, 0.4, 0.5], [0.4, 0.4, 0.2]])
    theirs = routing([[0.3, 0.0, 0.7], [0.4, 0.6, 0.0]], mine.scores)
    compared = compare_routing(mine, theirs, top_k=2)
    assert compared.flipped.tolist() == [True, False]
    np.testing.assert_allclose(compared.agreement, [1 / 3, 1])
    np.testing.assert_allclose(compared.weight, [0.4, 0])
    np.testing.assert_allclose(compared.gate_error, [0.4 / 0.6, 0.1 / 0.6])


def test_a_gate_that_is_not_a_number_never_agrees():
    good, bad = routing([[0.0, 1.0]], [[0.1, 0.9]]), routing([[np.nan, np.nan]], [[0.1, 0.9]])
    compared = compare_routing(good, bad, top_k=1)
    assert compared.flipped.tolist() == [True]
    assert (compared.weight.tolist(), compared.gate_error.tolist()) == ([np.inf], [np.inf])


def test_margins_of_probabilities_are_relative_to_the_last_one_selected():
    np.testing.assert_allclose(selection_margin(np.array([[0.90, 0.06, 0.03, 0.01]]), 2), [0.5])


def test_margins_of_logits_near_zero_are_relative_to_the_logits():
    np.testing.assert_allclose(selection_margin(np.array([[4.0, 0.001, 0.0, -4.0]]), 2), [0.001 / 2.00025])


def test_where_nothing_else_could_be_selected_the_margin_is_infinite():
    scores = np.array([[0.5, 0.5, -np.inf], [0.2, 0.5, 0.3]])
    assert selection_margin(scores, 2)[0] == np.inf
    assert selection_margin(scores, 3).tolist() == [np.inf, np.inf]


def test_experts_are_compared_by_their_ids_in_the_source_model():
    mine = Routing.of(np.array([[0.0, 0.3, 0.7]]), np.array([[0.1, 0.3, 0.6]]), keep=(0, 2, 5), experts=6)
    theirs = Routing.of(np.array([[0.3, 0.7]]), np.array([[0.3, 0.6]]), keep=(2, 5), experts=6)
    assert not compare_routing(mine, theirs, top_k=2).flipped.any()
    assert theirs.scores[0, [0, 1, 3, 4]].tolist() == [-np.inf] * 4


def test_a_flip_between_an_expert_and_a_row_that_leads_to_none_is_judged_by_both():
    """Expert 2 was chosen beside a row of a full router whose expert went; its rival scored a hair less."""
    gates, scores = np.array([[0.0, 0.6]]), np.array([[0.1, 0.5, 0.49999, 0.9]])
    mine = Routing.of(gates, scores, keep=(0, 2), experts=3)
    theirs = Routing.of(np.array([[0.0, 0.0]]), scores, keep=(0, 2), experts=3)
    compared = compare_routing(mine, theirs, top_k=2)
    assert compared.flipped.all()
    assert compared.margin[0] == pytest.approx(2e-5)


def test_a_layer_without_a_router_sends_every_token_to_its_one_expert():
    alone = Routing.of_one_expert(tokens=2, keep=(3,), experts=4)
    assert alone.gates.tolist() == [[0, 0, 0, 1]] * 2


def test_kl_of_a_known_pair():
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    np.testing.assert_allclose(parity.kl_divergence(p, q), [0.5 * np.log(2) + 0.5 * np.log(2 / 3)])


@given(PROBABILITIES, PROBABILITIES)
def test_measures_stay_in_their_bounds_and_know_identity(p, q):
    assert (parity.kl_divergence(p, q) >= -1e-12).all()
    assert ((parity.esap(p, q) >= 0) & (parity.esap(p, q) <= 1 + 1e-12)).all()
    assert ((parity.cosine(p, q) >= -1e-12) & (parity.cosine(p, q) <= 1 + 1e-12)).all()
    np.testing.assert_allclose(parity.esap(p, p), 1)
    np.testing.assert_allclose(parity.cosine(p, p), 1)
    np.testing.assert_allclose(parity.kl_divergence(p, p), 0, atol=1e-15)
    assert parity.same_top1(p, p).all()


@given(hnp.arrays(np.float64, (2, 4), elements=st.floats(-500, 500)), st.floats(-1000, 1000))
def test_softmax_sums_to_one_and_ignores_a_shift(logits, shift):
    np.testing.assert_allclose(parity.softmax(logits).sum(-1), 1)
    np.testing.assert_allclose(parity.softmax(logits + shift), parity.softmax(logits), atol=1e-9)
