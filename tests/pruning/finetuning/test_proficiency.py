"""The rule that drops experts, on the worked numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_spec.errors import UserError
from pruning.finetuning.options import TaskSpecific
from pruning.finetuning.proficiency import best, drop_steps, normalised, survivors

EVERYONE = range(4)


@pytest.mark.parametrize(
    ("gathered", "shares", "left"),
    [
        ([2.0, 1.0, 1.0, 0.0], [0.5, 0.25, 0.25, 0.0], (0, 1, 2)),
        ([1.5, 0.7, 0.5, 0.0], [0.5556, 0.2593, 0.1852, 0.0], (0, 1)),
    ],
    ids=["hit-rate", "alpha"],
)
def test_four_tokens_tell_the_scores_apart(gathered, shares, left):
    scores_E = normalised(np.array(gathered), EVERYONE)
    np.testing.assert_allclose(scores_E, shares, atol=5e-5)
    assert survivors(scores_E, EVERYONE, beta=0.8, floor=1) == left


@pytest.mark.parametrize(
    ("beta", "first", "second"), [(0.9, (0, 1), (0,)), (0.5, (0, 1), (0, 1))], ids=["ends early", "is forced"]
)
def test_the_threshold_grows_as_experts_go(beta, first, second):
    scores_E = np.array([0.60, 0.30, 0.08, 0.02])
    left = survivors(scores_E, EVERYONE, beta, floor=1)
    assert left == first
    scores_E = normalised(scores_E, left)
    np.testing.assert_allclose(scores_E, [2 / 3, 1 / 3, 0, 0])
    left = survivors(scores_E, left, beta, floor=1)
    assert left == second
    assert best(scores_E, left, 1) == (0,)


def test_the_floor_keeps_the_best_of_the_alive():
    scores_E = np.array([0.0, 0.5, 0.01, 0.49])
    assert survivors(scores_E, EVERYONE, beta=1.0, floor=3) == (1, 2, 3)
    assert survivors(np.zeros(4), (1, 2, 3), beta=1.0, floor=2) == (1, 2)


def test_no_hits_are_equal_shares():
    assert normalised(np.zeros(4), (1, 3)).tolist() == [0, 0.5, 0, 0.5]


@given(
    st.lists(st.floats(0, 1e6), min_size=8, max_size=8),
    st.sets(st.integers(0, 7), min_size=1).map(sorted),
    st.floats(0.01, 1),
    st.integers(1, 8),
)
def test_who_is_left_was_alive_and_includes_the_best(values, alive, beta, floor):
    scores_E = normalised(np.array(values), alive)
    assert scores_E.sum() == pytest.approx(1)
    left = survivors(scores_E, alive, beta, floor)
    assert set(left) <= set(alive)
    assert len(left) >= min(floor, len(alive))
    assert set(best(scores_E, alive, 1)) <= set(left)
    assert list(left) == sorted(left)


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        (TaskSpecific(), 1000, {100: 0.5, 200: 0.5, 300: 0.5, 400: 0.5, 500: None}),
        (TaskSpecific(windows=3, beta=0.1), 20, {3: 0.1, 6: 0.1, 10: None}),
        (TaskSpecific(windows=1), 2, {1: None}),
        (TaskSpecific(variant="staged"), 9, {4: None}),
        (TaskSpecific(variant="two-pass"), 9, {9: None}),
    ],
)
def test_when_experts_go(options, steps, expected):
    assert drop_steps(options, steps) == expected


def test_fewer_steps_than_windows_are_refused():
    with pytest.raises(UserError) as caught:
        drop_steps(TaskSpecific(windows=5), 9)
    assert caught.value.what == "the first half of 9 steps cannot be divided into 5 windows"
    assert caught.value.hint == "give at least 10 steps: --steps 10; or fewer windows: --windows 1"
