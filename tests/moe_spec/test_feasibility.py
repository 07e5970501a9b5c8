import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups, check_keep

EXPERTS = 12
NOBODY = -1


@st.composite
def grouped_plans(draw):
    """Groups, K, and a keep list that may or may not work."""
    count = draw(st.sampled_from([1, 2, 3, 4, 6]))
    groups = Groups(count, draw(st.integers(1, count)))
    return groups, draw(st.integers(1, 4)), sorted(draw(st.sets(st.integers(0, EXPERTS - 1), min_size=1)))


def works(keep, top_k, groups):
    try:
        check_keep("mlp", EXPERTS, top_k, keep, groups)
    except UserError:
        return False
    return True


def select(scores_E, keep, top_k, groups, unselectable):
    """DeepSeek-V3's choice, with the dropped experts' scores set to ``unselectable``.

    Where fewer than K experts pass, what top-k takes is an accident of ties: NOBODY stands for it.
    """
    masked_GE = np.where(np.isin(np.arange(EXPERTS), keep), scores_E, unselectable).reshape(groups.count, -1)
    group_scores_G = np.sort(masked_GE, axis=1)[:, -2:].sum(axis=1)
    chosen = np.argsort(-group_scores_G, kind="stable")[: groups.selected]
    passed_GE = np.full_like(masked_GE, -np.inf)
    passed_GE[chosen] = masked_GE[chosen]
    passed_E = passed_GE.flatten()
    best = np.argsort(-passed_E, kind="stable")[:top_k]
    return {NOBODY if np.isneginf(passed_E[expert]) else int(expert) for expert in best}


@given(grouped_plans(), st.integers(0, 2**32 - 1))
def test_an_accepted_plan_routes_to_survivors_only_however_unselectable_the_rest_is(plan, seed):
    groups, top_k, keep = plan
    if not works(keep, top_k, groups):
        return
    scores_E = np.random.default_rng(seed).random(EXPERTS)
    selected = select(scores_E, keep, top_k, groups, unselectable=-1e3)
    assert selected <= set(keep)
    assert selected == select(scores_E, keep, top_k, groups, unselectable=-1e30)


@given(grouped_plans())
def test_a_refused_plan_has_scores_for_which_the_router_fails(plan):
    groups, top_k, keep = plan
    if works(keep, top_k, groups):
        return

    def fails(scores_E):
        selected = select(scores_E, keep, top_k, groups, unselectable=-1e3)
        return not selected <= set(keep) or selected != select(scores_E, keep, top_k, groups, unselectable=-1e30)

    rng = np.random.default_rng(0)
    assert any(fails(rng.random(EXPERTS)) for _ in range(300))


@given(grouped_plans())
def test_keeping_everything_always_works(plan):
    groups, top_k, _ = plan
    if top_k <= groups.selected * EXPERTS // groups.count:
        check_keep("mlp", EXPERTS, top_k, range(EXPERTS), groups)


@pytest.mark.parametrize("keep", [[1, 0], [0, 0], [-1, 2], [3, 12]])
def test_ids_are_ascending_distinct_and_in_range(keep):
    message = f"layer mlp keeps {keep}, expected ascending, distinct ids from 0 to 11"
    with pytest.raises(UserError, match=re.escape(message)):
        check_keep("mlp", EXPERTS, 1, keep)


def test_a_layer_keeps_someone():
    with pytest.raises(UserError, match=re.escape("layer mlp keeps no expert")):
        check_keep("mlp", EXPERTS, 1, [])


def test_a_router_has_k_experts_to_select():
    check_keep("mlp", EXPERTS, 2, [3, 5])
    with pytest.raises(UserError) as caught:
        check_keep("mlp", EXPERTS, 3, [3, 5])
    assert caught.value.what == "layer mlp keeps 2 of 12 experts, but its router selects K=3 a token"
    assert caught.value.hint == "keep at least 3: --keep 3; or let K shrink with the layer: --clamp-top-k"


def test_groups_that_cannot_be_told_apart_are_refused_with_the_nearest_count():
    with pytest.raises(UserError) as caught:
        check_keep("mlp", 8, 2, [0, 1, 2, 4], Groups(4, 2))
    assert caught.value.what == (
        "layer mlp keeps [2, 1, 1, 0] experts in its 4 routing groups, of which 2 are selected for K=2: "
        "the router cannot choose among them"
    )
    assert caught.value.hint == "keep the same number in every group; the nearest such plan is --keep 8"


def test_groups_that_hold_fewer_than_k_are_refused():
    with pytest.raises(UserError) as caught:
        check_keep("mlp", 8, 3, [0, 1, 4, 5, 6, 7], Groups(2, 1))
    assert caught.value.what == (
        "layer mlp keeps [2, 4] experts in its 2 routing groups, of which 1 is selected for K=3: "
        "the router cannot choose among them"
    )
    assert caught.value.hint == "keep the same number in every group; the nearest such plan is --keep 6"
