import dataclasses

import numpy as np
import pytest

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups
from moe_spec.layer_plan import LayerPlan, Merge
from pruning.budget.ranked import RankedLayer
from pruning.merging.mergers import MERGERS
from pruning.merging.plan import check_merging, merge_instead
from pruning.options import PlanOptions
from pruning.plan import check_counts
from tests.pruning.merging.observed import observed

UNCURL = observed([(1, 0), (2, 0), (0, 1), (0, 3)], tokens=(3, 1, 2, 2))


def budget(layer, keep):
    """What a criterion and a budget would leave; a merger asks only how many."""
    return LayerPlan(layer.name, layer.experts, layer.top_k, tuple(keep), groups=layer.groups)


def test_the_worked_example():
    made = merge_instead(budget(UNCURL, (0, 1)), UNCURL, MERGERS["uncurl"], "new")
    assert made.keep == (0, 2)
    assert made.merge == (Merge((0, 1), (3.0, 1.0)), Merge((2, 3), (2.0, 2.0)))
    assert (made.scores, made.router, made.align) == ((3.0, 1.0, 2.0, 2.0), "new", True)


def test_experts_that_no_token_chose_count_alike_and_the_first_survives():
    layer = observed([(1, 0), (2, 0), (0, 1), (0, 3)], tokens=(0, 0, 0, 2))
    made = merge_instead(budget(layer, (0, 1)), layer, MERGERS["m-smoe"], "mean")
    assert made.keep == (0, 3)
    assert made.merge == (Merge((0, 1), (1.0, 1.0)), Merge((2, 3), (0.0, 2.0)))


def test_ream_weighs_by_saliency():
    layer = observed([(1, 0), (2, 0), (0, 1), (0, 3)], np.ones((4, 2, 3)), tokens=(5, 1, 1, 1), saliency=(1, 4, 2, 3))
    made = merge_instead(budget(layer, (0, 1)), layer, MERGERS["ream"], "rows")
    assert (made.keep, made.scores) == ((1, 3), (1.0, 4.0, 2.0, 3.0))
    assert made.merge == (Merge((0, 1, 2), (1.0, 4.0, 2.0)), Merge((3,), (3.0,)))
    assert made.router == "rows"


@pytest.mark.parametrize("router", ["rows", "mean", "new"])
def test_the_user_may_choose_what_becomes_of_the_router(router):
    assert merge_instead(budget(UNCURL, (0, 1)), UNCURL, MERGERS["uncurl"], router).router == router


def grouped(name, keep):
    """Two routing groups of four; logits and outputs that would pair experts across them."""
    logits_ET = np.tile(np.eye(4), (2, 1)) + np.repeat([[0.0, 0.1, 0.0, 0.0], [0.0, 0.0, 0.1, 0.0]], 4, axis=0)
    layer = observed(logits_ET, np.stack([logits_ET + 1] * 4, axis=1), tokens=range(1, 9), saliency=range(1, 9))
    layer = dataclasses.replace(layer, groups=Groups(2, 1))
    return merge_instead(budget(layer, keep), layer, MERGERS[name], "rows")


@pytest.mark.parametrize("name", MERGERS)
def test_routing_groups_are_merged_one_by_one(name):
    made = grouped(name, (0, 1, 4, 5))
    assert Groups(2, 1).survivors(made.keep, 8) == [2, 2]
    assert {expert for merge in made.merge for expert in merge.experts} == set(range(8))
    assert all(len({expert // 4 for expert in merge.experts}) == 1 for merge in made.merge)


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return caught.value.what, caught.value.hint


def test_experts_of_different_routing_groups_cannot_become_one():
    layer = dataclasses.replace(UNCURL, groups=Groups(2, 1, scored_by=1))
    assert refusal(merge_instead, budget(layer, (0,)), layer, MERGERS["uncurl"], "new") == (
        "layer layers.0.mlp merges its experts into 1, but has 2 routing groups: experts of different groups cannot "
        "become one",
        "keep a multiple of 2, the number of groups: --keep 2",
    )
    merges = (Merge((0, 2), (1, 1)), Merge((1, 3), (1, 1)))
    assert refusal(LayerPlan, "layers.0.mlp", 4, 1, (0, 3), (), Groups(2, 1, 1), "rows", merges) == (
        "layer layers.0.mlp merges experts [0, 2], which are of different routing groups",
        "merge inside each of the 2 groups; make it again with `moe-edge plan`",
    )


def test_a_full_router_is_refused():
    assert refusal(check_merging, "uncurl", "full", protect=False) == (
        "'full' is no router of a plan that merges experts",
        "known: alias, mean, new, rows",
    )


def test_super_experts_cannot_stay_as_they_are():
    assert refusal(check_merging, "uncurl", "new", protect=True) == (
        "--protect keeps super experts as they are, but criterion 'uncurl' merges experts",
        "leave out --protect",
    )


@pytest.mark.parametrize(
    ("name", "key", "how"),
    [
        ("uncurl", "logit_gram", "moe-edge calibrate on the checkpoint"),
        ("m-smoe", "logit_gram", "moe-edge calibrate on the checkpoint"),
        ("hc-smoe", "output_of_all", "moe-edge calibrate --dense"),
        ("hc-smoe-cosine", "output_of_all", "moe-edge calibrate --dense"),
        ("ream", "output_cosine", "moe-edge calibrate --dense"),
    ],
)
def test_statistics_that_were_not_taken_are_asked_for(name, key, how):
    layer = observed([(1, 0), (0, 1)], np.ones((2, 2, 1)))
    layer = dataclasses.replace(layer, sums={other: values for other, values in layer.sums.items() if other != key})
    what, hint = refusal(merge_instead, budget(layer, (0,)), layer, MERGERS[name], "rows")
    assert what.startswith(f"the statistics of layer layers.0.mlp lack {key!r}: ")
    assert hint == how


@pytest.mark.parametrize("name", MERGERS)
def test_statistics_that_are_not_finite_are_refused(name):
    layer = observed([(1, 0), (0, 1)], np.ones((2, 2, 1)))
    layer.sums["logit_gram"][0, 1] = np.inf
    assert refusal(merge_instead, budget(layer, (0,)), layer, MERGERS[name], "rows") == (
        "the statistics of layer layers.0.mlp are not finite: the model overflowed on the calibration data",
        "calibrate again, with data that the model can take",
    )


def test_a_merger_says_where_it_is_not_what_its_paper_does():
    assert MERGERS["uncurl"].notes("new") == ("the router is drawn anew: until it is trained, it chooses at random",)
    assert MERGERS["uncurl"].notes("mean") == (
        "the paper's router (--router new): all rows are drawn anew, and have to be trained. This plan's: the row of a "
        "survivor is the weighted mean of those merged into it",
    )
    assert MERGERS["hc-smoe"].notes("mean") == (
        "the paper's router (--router alias): the router stays as it is: all rows of a group lead to the one expert "
        "that it became, and gates add up. This plan's: the row of a survivor is the weighted mean of those merged "
        "into it",
    )
    assert MERGERS["hc-smoe"].notes("alias") == ()
    assert [len(row.notes(row.router)) for row in MERGERS.values()] == [1, 2, 1, 1, 3]


def test_rows_that_share_experts_may_be_of_different_routing_groups():
    layer = dataclasses.replace(UNCURL, groups=Groups(2, 1))
    made = merge_instead(budget(layer, (0, 1, 2)), layer, MERGERS["m-smoe"], "alias")
    assert (made.router, len(made.keep), made.top_k) == ("alias", 3, layer.top_k)
    assert {expert for merge in made.merge for expert in merge.experts} == {0, 1, 2, 3}


def test_groups_that_cannot_hold_all_experts_are_refused_where_rows_share_them():
    layers = [RankedLayer("layers.0.mlp", top_k=1, groups=None, scores=np.zeros(33))]
    assert refusal(check_counts, layers, PlanOptions(2, "ream", router="alias")) == (
        "layer layers.0.mlp merges its 33 experts into 2 groups of at most 16, but with --router alias each has to be "
        "in one",
        "keep at least 3: --keep 3; or drop the others: --router rows",
    )
    check_counts(layers, PlanOptions(3, "ream", router="alias"))
    check_counts(layers, PlanOptions(2, "ream"))


def test_no_row_may_lead_nowhere_where_rows_share_experts():
    with pytest.raises(UserError) as caught:
        LayerPlan("mlp", 4, 1, (0,), router="alias", merge=(Merge((0, 1, 2), (1, 1, 1)),))
    assert (caught.value.what, caught.value.hint) == (
        "layer mlp keeps [0] but merges [[0, 1, 2]]",
        "each survivor with itself and others, no expert twice, with the router 'alias' every expert, weights above 0; "
        "make it again with `moe-edge plan`",
    )
