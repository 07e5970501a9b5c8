"""A router with two rows swapped, among so many experts that margins excuse its flips in every coarse format."""

import numpy as np
import pytest

from runtime.parity import Routing, compare_routing, moved_experts, softmax
from runtime.verification.tally import LayerTally
from runtime.verification.tolerances import TOLERANCES
from runtime.verification.verdict import first_wrong_layer, why_it_failed

T, E, K, H = 512, 64, 8, 32
RANDOM = np.random.default_rng(0)
HIDDEN_TH, ROUTER_HE = RANDOM.standard_normal((T, H)), RANDOM.standard_normal((H, E)) / np.sqrt(H)
NOISE_TH = RANDOM.standard_normal((T, H))
SWAPPED = [0, 1, 2, 7, 4, 5, 6, 3, *range(8, E)]


def routing(hidden_TH, router_HE, *, renormalise=True):
    """Softmax, top-8."""
    scores_TE = softmax(hidden_TH @ router_HE)
    gates_TE = np.where(scores_TE >= np.sort(scores_TE, axis=1)[:, -K, None], scores_TE, 0.0)
    return Routing(gates_TE / (gates_TE.sum(axis=1, keepdims=True) if renormalise else 1), scores_TE)


def judged(reference, candidate, precision):
    tally = LayerTally("mlp", TOLERANCES[precision])
    for half in (slice(T // 2), slice(T // 2, T)):
        mine, theirs = (Routing(side.gates[half], side.scores[half]) for side in (reference, candidate))
        tally.add(compare_routing(mine, theirs, K), np.ones(T // 2, np.bool_), mine, theirs)
    layer = tally.report()
    return layer, why_it_failed([layer], [], None, TOLERANCES[precision]), first_wrong_layer([layer], tally.tolerance)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("precision", ["int4", "float4e2m1", "w8a8"])
def test_two_router_rows_that_changed_places_are_told_in_a_coarse_format(precision, renormalise):
    reference = routing(HIDDEN_TH, ROUTER_HE, renormalise=renormalise)
    noisy_TH = HIDDEN_TH + 0.003 * NOISE_TH
    honest = routing(noisy_TH, ROUTER_HE, renormalise=renormalise)
    layer, reasons, _ = judged(reference, honest, precision)
    assert (layer.flips > 0, layer.scored_as, reasons) == (True, (), ())
    swapped = routing(noisy_TH, ROUTER_HE[:, SWAPPED], renormalise=renormalise)
    layer, reasons, wrong = judged(reference, swapped, precision)
    assert (layer.faults, layer.scored_as, wrong) == (0, tuple(SWAPPED), "mlp")
    assert reasons[0] == "layer mlp: its router scores expert 3 as expert 7, expert 7 as expert 3 should be"


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1, 0.5, 1.0, 3.0])
def test_noise_of_any_size_looks_like_no_other_expert(noise):
    """Not that of every token by itself, nor one that is the same for all, nor where rows are alike."""
    alike_HE = np.repeat(ROUTER_HE[:, : E // 2], 2, axis=1) + 1e-3 * ROUTER_HE
    for router_HE in (ROUTER_HE, alike_HE):
        reference = routing(HIDDEN_TH + 5, router_HE)
        for noise_TH in (NOISE_TH, NOISE_TH[:1]):
            assert moved_experts(reference, routing(HIDDEN_TH + 5 + noise * noise_TH, router_HE)) == {}


def test_what_cannot_be_selected_has_no_scores_to_compare():
    mine, theirs = HIDDEN_TH @ ROUTER_HE, HIDDEN_TH @ ROUTER_HE[:, SWAPPED]
    mine[:, 20:30], theirs[:, 40:50] = -np.inf, -1e30
    mine[::2, 60], theirs[::3, 61] = -np.inf, np.nan
    gates = np.zeros((T, E))
    assert moved_experts(Routing(gates, mine), Routing(gates, theirs)) == {3: 7, 7: 3}


def test_few_tokens_tell_nothing():
    few = [
        Routing(side.gates[:15], side.scores[:15])
        for side in (routing(HIDDEN_TH, ROUTER_HE[:, order]) for order in (SWAPPED, range(E)))
    ]
    assert moved_experts(*few) == {}
