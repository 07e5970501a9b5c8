import numpy as np
import pytest

from moe_spec import LayerStatistics
from pruning.criteria import CRITERIA, DATA_FREE_CRITERIA

NORMS = (1, 2, 6)
GATES = ({0: 0.9, 1: 0.1}, {0: 0.8, 1: 0.2}, {1: 0.5, 2: 0.5}, {0: 0.6, 1: 0.4})
"""Three experts with constant output norms; four tokens with renormalised top-2 gates."""


def layer(norms=NORMS, gates=GATES):
    sums = {key: np.zeros(len(norms)) for key in ("tokens", "gate", "output_norm", "output_norm_squared", "gated_norm")}
    for token in gates:
        for expert, gate in token.items():
            norm = norms[expert]
            sums["tokens"][expert] += 1
            sums["gate"][expert] += gate
            sums["output_norm"][expert] += norm
            sums["output_norm_squared"][expert] += norm**2
            sums["gated_norm"][expert] += gate * norm
    return LayerStatistics("mlp", len(norms), 2, len(gates), sums)


@pytest.mark.parametrize(
    ("criterion", "scores", "first_to_go"),
    [
        ("frequency", (3, 4, 1), 2),
        ("gate-mass", (2.3, 1.2, 0.5), 2),
        ("reap", (0.7667, 0.6, 3.0), 1),
    ],
)
def test_one_fixture_tells_the_criteria_apart(criterion, scores, first_to_go):
    found = CRITERIA[criterion](layer())
    np.testing.assert_allclose(found, scores, atol=5e-5)
    assert found.dtype == np.float64
    assert found.argmin() == first_to_go


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_expert_that_was_never_selected_scores_zero(criterion):
    dead = CRITERIA[criterion](layer(norms=(1, 2, 6, 9)))
    assert dead[3] == 0
    assert np.isfinite(dead).all()


def test_random_repeats_with_its_seed():
    first, second, other = (DATA_FREE_CRITERIA["random"](8, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
