import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups, Kernels
from pruning.budget.keep import parse_keep
from pruning.budget.ranked import RankedLayer
from pruning.budget.scopes import SCOPES
from pruning.routers import check_router


def layer(scores, name="mlp", top_k=2, groups=None, **options):
    return RankedLayer(name, top_k, groups, np.asarray(scores, np.float64), **options)


def kept(layers, keep, scope="layer", clamp=False):
    layers = [dataclasses.replace(one, clamp_top_k=clamp) for one in layers]
    counts = SCOPES[scope].spread(layers, keep)
    return [one.plan(count).keep for one, count in zip(layers, counts, strict=True)]


@pytest.mark.parametrize(
    ("text", "keep"),
    [("1", 1), ("8", 8), ("1.0", 1.0), ("100%", 1.0), ("50%", 0.5), (".5", 0.5), ("12.5%", 0.125), ("1e-1", 0.1)],
)
def test_a_whole_number_is_a_count_and_anything_else_a_share(text, keep):
    assert (parse_keep(text), type(parse_keep(text))) == (keep, type(keep))


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "8.0", "0.0", "0%", "101%", "-50%", "nan", "inf", "half", "", "%", "3 of 8"]
)
def test_what_is_neither_count_nor_share_is_refused(text):
    with pytest.raises(UserError) as caught:
        parse_keep(text)
    assert caught.value.what == f"--keep {text} is neither a count of experts nor a share of them"
    expected = "give a whole number from 1, like --keep 4, or a share above 0 and at most 1, like --keep 0.5 or 50%"
    assert caught.value.hint == expected


@pytest.mark.parametrize(
    ("share", "experts", "count"),
    [(0.5, 8, 4), (1.0, 8, 8), (0.3, 8, 2), (0.3125, 8, 3), (0.35, 10, 4), (0.01, 8, 1), (0.999, 8, 8)],
)
def test_a_share_is_rounded_half_up_to_at_least_one_expert(share, experts, count):
    assert layer(np.ones(experts)).count(share) == count


def test_more_experts_than_there_are_is_refused():
    with pytest.raises(UserError, match=re.escape("--keep 9 asks for 9 experts, but layer mlp has 8")) as caught:
        kept([layer(range(8))], 9)
    assert caught.value.hint == "keep at most 8: --keep 8"


def test_the_best_stay_in_ascending_order_and_ties_go_to_the_lower_id():
    assert kept([layer([3, 9, 3, 1, 9, 3])], 4) == [(0, 1, 2, 4)]
    assert kept([layer(np.zeros(5))], 3) == [(0, 1, 2)]


def test_fewer_than_k_needs_a_clamp():
    with pytest.raises(UserError) as caught:
        kept([layer(range(8))], 1)
    assert caught.value.what == "layer mlp keeps 1 of 8 experts, but its router selects K=2 a token"
    assert caught.value.hint == "keep at least 2: --keep 2; or let K shrink with the layer: --clamp-top-k"
    clamped = layer(range(8), clamp_top_k=True).plan(1)
    assert (clamped.keep, clamped.top_k) == ((7,), 1)


def test_a_clamp_leaves_k_alone_where_enough_experts_stay():
    assert [layer(range(8), top_k=4, clamp_top_k=True).plan(count).top_k for count in (3, 4, 5)] == [3, 4, 4]


TWO_GROUPS = {"top_k": 2, "groups": Groups(count=2, selected=1)}


def test_every_group_keeps_the_same_number():
    grouped = layer([9, 8, 7, 6, 5, 4, 3, 2], **TWO_GROUPS)
    assert kept([grouped], 4) == [(0, 1, 4, 5)]
    assert kept([grouped], 8) == [tuple(range(8))]


@pytest.mark.parametrize(
    ("keep", "clamp", "nearest"),
    [
        (3, False, "--keep 4 or --keep 6"),
        (5, False, "--keep 4 or --keep 6"),
        (7, False, "--keep 6 or --keep 8"),
        (2, False, "--keep 4 or --keep 6"),
        (1, False, "--keep 4 or --keep 6"),
        (2, True, "--keep 1 or --keep 4"),
    ],
)
def test_a_count_that_groups_cannot_share_is_refused_with_the_nearest_that_they_can(keep, clamp, nearest):
    with pytest.raises(UserError) as caught:
        kept([layer(range(8), **TWO_GROUPS)], keep, clamp=clamp)
    assert caught.value.what == (
        f"layer mlp keeps {keep} of 8 experts, but its router selects K=2 from 1 of 2 groups: "
        "every group must keep the same number, and enough of them"
    )
    assert caught.value.hint == f"the nearest that works: {nearest}"


def test_one_expert_may_survive_all_groups_with_a_clamp():
    plan = layer([1, 2, 3, 4, 9, 0, 0, 0], **TWO_GROUPS, clamp_top_k=True).plan(1)
    assert (plan.keep, plan.top_k) == ((4,), 1)


def test_with_groups_k_shrinks_to_what_the_selected_groups_hold():
    wide = layer(range(8), top_k=4, groups=Groups(count=2, selected=1), clamp_top_k=True)
    assert [wide.plan(count).top_k for count in (1, 4, 6, 8)] == [1, 2, 3, 4]


def test_a_global_budget_goes_where_the_scores_are():
    even, steep = layer([1, 1, 1, 1], name="even", top_k=1), layer([97, 1, 1, 1], name="steep", top_k=1)
    assert kept([steep, even], 2, scope="layer") == [(0, 1), (0, 1)]
    assert kept([steep, even], 2, scope="global") == [(0,), (0, 1, 2)]


def test_a_global_ranking_does_not_mind_the_scale_of_a_layer():
    rng = np.random.default_rng(0)
    scores = rng.random((2, 8))
    grown = [layer(scores[0]), layer(scores[1] * 1000, name="deep")]
    assert kept([layer(scores[0]), layer(scores[1])], 4, "global") == kept(grown, 4, "global")


@pytest.mark.parametrize(("clamp", "floor"), [(False, 2), (True, 1)])
def test_a_global_budget_leaves_every_layer_its_floor(clamp, floor):
    dead, alive = layer([1, 0, 0, 0], name="dead"), layer([1, 1, 1, 1], name="alive")
    assert [len(keep) for keep in kept([dead, alive], 2, "global", clamp)] == [floor, 4 - floor]


def test_a_global_budget_below_the_floors_is_refused():
    with pytest.raises(UserError) as caught:
        kept([layer(range(8)), layer(range(8))], 1, "global")
    assert caught.value.what == "--keep 1 leaves 2 experts for 2 layers, which need at least 4"
    assert caught.value.hint == "keep more: --keep 2; or let K shrink: --clamp-top-k"


def test_a_layer_of_zeros_is_the_first_to_shrink():
    assert kept([layer(np.zeros(4)), layer([1, 1, 1, 1])], 3, "global") == [(0, 1), (0, 1, 2, 3)]


def test_a_global_budget_grows_layers_with_groups_by_one_expert_of_each():
    weak = layer([1, 1, 0, 0, 1, 1, 0, 0], name="weak", **TWO_GROUPS)
    even = layer(np.ones(8), name="even", **TWO_GROUPS)
    assert [len(keep) for keep in kept([weak, even], 5, "global")] == [4, 6]


@pytest.mark.parametrize("scores", [range(8), np.zeros(8)])
def test_a_global_budget_that_groups_cannot_spend_is_refused_whatever_the_scores(scores):
    with pytest.raises(UserError) as caught:
        kept([layer(scores, **TWO_GROUPS)], 5, "global")
    assert caught.value.what == "--keep 5 asks for 5 experts in all, but routing groups let 4 be kept"
    assert caught.value.hint == "keep a multiple of 2, the number of groups, in every layer"


def test_a_router_that_stays_keeps_k_and_binds_nothing():
    whole = layer([9, 8, 7, 6, 5, 4, 3, 2], router="full", **TWO_GROUPS)
    made = whole.plan(1)
    assert (made.router, made.top_k, made.keep, made.groups) == ("full", 2, (0,), Groups(2, 1))
    assert whole.plan(3).keep == (0, 1, 2)
    assert whole.legal_counts() == list(range(1, 9))


def test_a_router_that_stays_lets_a_global_budget_leave_one_expert():
    dead, alive = layer([1, 0, 0, 0], name="dead", router="full"), layer([1, 1, 1, 1], name="alive", router="full")
    assert [len(keep) for keep in kept([dead, alive], 2, "global")] == [1, 3]


@pytest.mark.parametrize(
    ("router", "clamp", "what", "hint"),
    [
        (
            "ful",
            False,
            "'ful' is no router of a plan that drops experts",
            "did you mean 'full'? known: full, replace, rows",
        ),
        ("mean", False, "'mean' is no router of a plan that drops experts", "known: full, replace, rows"),
        (
            "full",
            True,
            "--clamp-top-k lets K shrink, but --router full leaves it as it is",
            "leave out one of the two: with --router full fewer than K experts may be kept as it is",
        ),
    ],
)
def test_what_cannot_become_of_a_router_is_refused(router, clamp, what, hint):
    with pytest.raises(UserError) as caught:
        check_router(router, clamp_top_k=clamp)
    assert (caught.value.what, caught.value.hint) == (what, hint)


def test_protected_experts_are_kept_first():
    assert kept([layer([9, 8, 7, 6], protected=frozenset({3}))], 2) == [(0, 3)]
    assert kept([layer([9, 8, 7, 6], protected=frozenset({2, 3}))], 3) == [(0, 2, 3)]


def test_a_global_budget_keeps_protected_experts_first():
    weak, strong = layer([1, 5, 5, 5], protected=frozenset({1, 2, 3})), layer([1, 1, 1, 1])
    assert kept([weak, strong], 3, "global") == [(1, 2, 3), (0, 1, 2)]


def test_a_protected_expert_is_the_first_of_its_group():
    guarded = layer([9, 8, 7, 6, 5, 4, 3, 2], protected=frozenset({7}), **TWO_GROUPS)
    assert kept([guarded], 4) == [(0, 1, 4, 7)]


@pytest.mark.parametrize(("groups", "fewest"), [(None, 3), (Groups(2, 1, scored_by=1), 4)])
def test_more_protected_experts_than_are_kept_is_refused(groups, fewest):
    guarded = layer(range(8), protected=frozenset({1, 2, 6}), top_k=1, groups=groups)
    with pytest.raises(UserError) as caught:
        kept([guarded], 2)
    assert caught.value.what == (
        f"layer mlp keeps 2 of 8 experts, but [1, 2, 6] are protected, for which it has to keep {fewest}"
    )
    assert caught.value.hint == f"keep more: --keep {fewest}; or plan without --protect"


@pytest.mark.parametrize(("keep", "left"), [(0.1, 3), (0.25, 3), (0.5, 4), (3, 3)])
def test_a_share_never_goes_below_the_floor(keep, left):
    assert len(kept([layer(range(8), floor=3)], keep)[0]) == left


def test_a_count_below_the_floor_is_refused():
    with pytest.raises(UserError) as caught:
        kept([layer(range(8), floor=3)], 2)
    assert caught.value.what == "layer mlp keeps 2 of 8 experts, the floor is 3"
    assert caught.value.hint == "keep more: --keep 3; or a lower --floor"


def test_a_global_budget_leaves_every_layer_the_floor():
    dead, alive = layer([1, 0, 0, 0, 0, 0], name="dead", floor=3), layer(np.ones(6), name="alive", floor=3)
    assert [len(keep) for keep in kept([dead, alive], 4, "global")] == [3, 5]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("floor", [0, 9])
def test_a_floor_that_cannot_be_is_refused(scope, floor):
    with pytest.raises(UserError) as caught:
        SCOPES[scope].spread([layer(np.zeros(8), floor=floor)], 4)
    assert caught.value.what == f"--floor {floor} asks for {floor} experts, but layer mlp has 8"
    assert caught.value.hint == "give --floor 1 to 8"


EVENS = Kernels("gadget", (2, 6), max_top_k=2)


@pytest.mark.parametrize(("keep", "left"), [(0.1, 2), (0.25, 2), (0.5, 6), (1.0, 6), (6, 6)])
def test_a_share_is_rounded_to_what_kernels_take(keep, left):
    assert len(kept([layer(range(8), kernels=EVENS)], keep)[0]) == left


def test_a_share_is_rounded_to_what_kernels_and_groups_and_floor_take():
    some = Kernels("gadget", (3, 4, 6))
    assert len(kept([layer(range(8), kernels=some, **TWO_GROUPS)], 0.3)[0]) == 4
    assert len(kept([layer(range(8), kernels=some, **TWO_GROUPS, floor=5)], 0.3)[0]) == 6


@pytest.mark.parametrize(
    ("options", "keep", "what", "hint"),
    [
        (
            {},
            4,
            "layer mlp keeps 4 experts, target gadget takes 2 or 6",
            "the nearest that works: --keep 2 or --keep 6",
        ),
        (
            {"floor": 3},
            8,
            "layer mlp keeps 8 experts, target gadget takes 2 or 6",
            "the nearest that works: --keep 6",
        ),
        ({"floor": 7}, 0.5, "layer mlp keeps 7 experts, target gadget takes 2 or 6", "choose another --target"),
        (
            {"top_k": 3},
            6,
            "layer mlp selects K=3 experts a token, target gadget takes at most 2",
            "choose another --target",
        ),
    ],
)
def test_what_kernels_do_not_take_is_refused_with_the_nearest_that_they_do(options, keep, what, hint):
    with pytest.raises(UserError) as caught:
        kept([layer(range(8), kernels=EVENS, **options)], keep)
    assert (caught.value.what, caught.value.hint) == (what, hint)


def test_scores_below_zero_say_nothing_across_layers():
    with pytest.raises(UserError) as caught:
        kept([layer([1, 2, 3]), layer([1, -2, 3], name="deep")], 2, "global")
    assert caught.value.what == "layer deep has scores below 0, which say nothing across layers"
    assert caught.value.hint == "plan with --scope layer"
    assert kept([layer([1, -2, -1])], 2) == [(0, 2)]


scores = st.lists(st.floats(0, 1e6), min_size=4, max_size=16)


@given(scores, st.data())
def test_any_ranking_keeps_the_best_sorted_and_enough(values, data):
    keep = data.draw(st.integers(2, len(values)))
    (ids,) = kept([layer(values)], keep)
    assert list(ids) == sorted(set(ids))
    assert len(ids) == keep
    dropped = set(range(len(values))) - set(ids)
    assert min(values[i] for i in ids) >= max((values[i] for i in dropped), default=0)


@given(st.lists(st.floats(0, 1e6), min_size=6, max_size=6, unique=True), st.permutations(range(6)))
def test_renaming_experts_renames_the_plan(values, order):
    (ids,) = kept([layer(values)], 3)
    (renamed,) = kept([layer([values[i] for i in order])], 3)
    assert {order[i] for i in renamed} == set(ids)


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=8, max_size=8), min_size=1, max_size=4), st.integers(2, 8))
def test_a_global_budget_is_spent_to_the_last_expert(values, keep):
    layers = [layer(row) for row in values]
    counts = [len(ids) for ids in kept(layers, keep, "global")]
    assert sum(counts) == keep * len(layers)
    assert min(counts) >= 2
