"""Which experts are super experts."""

import numpy as np
import pytest

from moe_spec.errors import UserError
from moe_spec.statistics import LayerStatistics
from pruning.criteria.protection import super_experts


def layers(*peaks):
    return [
        LayerStatistics(f"layers.{i}.mlp", len(row), 2, 9, {"output_peak": np.array(row, float)})
        for i, row in enumerate(peaks)
    ]


def usual(*large):
    """64 experts with peaks around 1, but for the first ones."""
    return (*large, *np.linspace(0.5, 1.5, 64 - len(large)))


def test_the_few_with_outputs_far_above_all_others_are_super_experts():
    """Of 256 experts two are above the 99.5th percentile: that lies between the third and the second largest."""
    assert super_experts(layers(usual(), usual(900), usual(300), usual())) == [set(), {0}, {0}, set()]


def test_the_last_quarter_of_the_layers_has_none():
    assert super_experts(layers(usual(), usual(), usual(300), usual(900))) == [set(), set(), {0}, set()]
    assert super_experts(layers(usual(900))) == [set()]


def test_less_than_a_tenth_of_the_largest_is_not_super():
    assert super_experts(layers(usual(900), usual(89), usual(), usual())) == [{0}, set(), set(), set()]
    assert super_experts(layers(usual(900), usual(91), usual(), usual())) == [{0}, {0}, set(), set()]


def test_what_all_experts_reach_makes_none_super():
    assert super_experts(layers(*[np.ones(8)] * 4)) == [set()] * 4


def test_statistics_without_peaks_are_refused():
    bare = LayerStatistics("mlp", 2, 1, 9, {"tokens": np.ones(2)})
    with pytest.raises(UserError) as caught:
        super_experts([bare])
    assert caught.value.what == "the statistics of layer mlp lack 'output_peak': largest |element| of f_e(x) over X_e"
