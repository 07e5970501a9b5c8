import numpy as np
import pytest

from runtime.parity import Routing, softmax
from runtime.verification.diagnosis import what_experts_do, what_router_does

LOGITS = np.random.default_rng(0).standard_normal((9, 5)) * 3
OUTPUTS = np.random.default_rng(1).standard_normal((5, 9, 4))
TOLERANCE = 1e-4

SUMS = np.sort(softmax(LOGITS), axis=1)[:, -2:].sum(axis=1)
"""Of the two largest probabilities of each token."""


def routing(logits_TE, *, renormalise=True, scale=1.0):
    """Softmax, top-2."""
    scores_TE = softmax(logits_TE)
    gates_TE = np.where(scores_TE >= np.sort(scores_TE, axis=1)[:, -2:-1], scores_TE, 0.0)
    return Routing(gates_TE / (gates_TE.sum(axis=1, keepdims=True) if renormalise else 1) * scale, scores_TE)


@pytest.mark.parametrize(
    ("router", "says"),
    [
        (routing(LOGITS[:, [1, 0, 2, 3, 4]]), "it scores expert 0 as expert 1, expert 1 as expert 0 should be"),
        (routing(LOGITS[:, [0, 1, 2, 2, 4]]), "it scores expert 3 as expert 2 should be"),
        (routing(LOGITS, scale=2.5), "it selects the same experts, with gates 2.5 times as large"),
        (
            routing(LOGITS, renormalise=False),
            f"it selects the same experts, with gates that add up to {SUMS.min():.3g} to {SUMS.max():.3g} for a token "
            "instead of 1: only one of the two renormalises them",
        ),
        (
            Routing(routing(LOGITS).gates ** 2, routing(LOGITS).scores),
            "it selects the same experts, with other gates",
        ),
        (routing(LOGITS[::-1]), "it selects other experts for 8 of 9 tokens"),
    ],
)
def test_what_a_router_does_is_told(router, says):
    assert what_router_does(routing(LOGITS), router, TOLERANCE) == says


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ({1: OUTPUTS[2], 2: OUTPUTS[1]}, "expert 1 gives what expert 2 should; expert 2 gives what expert 1 should"),
        ({3: np.zeros((9, 4))}, "it gives nothing"),
        ({3: np.zeros((9, 4)), 4: np.zeros((9, 4))}, "each gives nothing"),
        (
            {expert: 3 * OUTPUTS[expert] for expert in range(5)},
            "every expert of the layer gives 3 times what it should",
        ),
        ({0: OUTPUTS[0] + 0.1}, "it differs by 0.0369 of its largest magnitude"),
        ({0: OUTPUTS[0] + 0.1, 1: OUTPUTS[1] + 0.2}, "they differ by 0.0369 to 0.121 of their largest magnitude"),
        ({}, "each gives what it should by itself, but not their sum"),
    ],
)
def test_what_experts_do_is_told(found, says):
    tables = {expert: (OUTPUTS[expert], outputs) for expert, outputs in found.items()}
    assert what_experts_do(tables, tuple(found), 5, TOLERANCE) == says
