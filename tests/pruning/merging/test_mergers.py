import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import laplacian

from moe_spec.layer_plan import MEAN, NEW, ROWS
from pruning.merging.mergers import CENTROID_CAPACITY, MERGERS, make_groups
from pruning.merging.similarity import cosine, logit_cosine
from tests.pruning.merging.observed import observed


def groups_of(name, layer, count):
    merger = MERGERS[name]
    groups = merger.group(layer, merger.scores(layer), count)
    return {frozenset(group) for group in groups}


UNCURL = observed([(1, 0), (2, 0), (0, 1), (0, 3)], tokens=(3, 1, 2, 2))
"""The worked example of the reference."""


def test_logits_that_point_the_same_way_are_similar_whatever_their_size():
    similarity_EE = (1 + logit_cosine(UNCURL)) / 2
    np.testing.assert_allclose(similarity_EE, np.kron(np.eye(2), np.full((2, 2), 0.5)) + 0.5, atol=1e-15)
    values = np.linalg.eigvalsh(laplacian(similarity_EE, normed=True))  # what scikit-learn clusters by
    np.testing.assert_allclose(values, [0, 1, 1.5, 1.5], atol=1e-12)


@pytest.mark.parametrize("name", ["uncurl", "m-smoe"])
def test_experts_with_similar_logits_become_one(name):
    assert groups_of(name, UNCURL, 2) == {frozenset({0, 1}), frozenset({2, 3})}


def test_the_dominant_expert_is_the_most_frequent_and_takes_those_that_are_routed_alike():
    layer = observed([(1, 0), (2, 0.1), (0, 1), (0.2, 3)], tokens=(1, 9, 8, 2))
    assert groups_of("m-smoe", layer, 2) == {frozenset({0, 1}), frozenset({2, 3})}
    assert groups_of("m-smoe", layer, 1) == {frozenset({0, 1, 2, 3})}


def test_mean_outputs_are_clustered_by_distance_or_by_angle():
    outputs_ETH = np.array([(1, 0), (9, 0), (0, 1), (9, 1)], np.float64)[:, np.newaxis, :]
    layer = observed(np.eye(4), np.concatenate([outputs_ETH] * 4, axis=1))
    assert groups_of("hc-smoe", layer, 2) == {frozenset({0, 2}), frozenset({1, 3})}
    assert groups_of("hc-smoe-cosine", layer, 2) == {frozenset({0, 1, 3}), frozenset({2})}


def test_the_linkage_is_the_average_one():
    # 0 and 2 merge first; their mean distance to 5 is 4, so 5 is nearer to 8.8 although single linkage says 3 < 3.8
    points = np.array([0.0, 2.0, 5.0, 8.8])
    layer = observed(np.eye(4), np.broadcast_to(points[:, np.newaxis, np.newaxis] + 1, (4, 4, 1)))
    assert groups_of("hc-smoe", layer, 2) == {frozenset({0, 1}), frozenset({2, 3})}


def test_the_most_salient_centroid_takes_its_nearest_first_and_all_that_it_can_hold():
    layer = observed([(1, 0), (1, 0.1), (0, 1), (0.1, 1)], np.ones((4, 2, 3)), saliency=(4, 1, 3, 2))
    assert groups_of("ream", layer, 2) == {frozenset({0, 1, 3}), frozenset({2})}


def test_outputs_weigh_as_much_as_logits():
    # to the centroid 0: logits and outputs of 2 have cosines (0.8, 0.8), of 3 (1, 0); a full group takes the nearer
    experts = CENTROID_CAPACITY + 2
    logits_ET = np.tile((1.0, 0.0), (experts, 1))
    outputs_EH = np.tile((1.0, 0.0), (experts, 1))
    logits_ET[2] = outputs_EH[2] = (0.8, 0.6)
    outputs_EH[3] = (0.0, 1.0)
    layer = observed(logits_ET, np.stack([outputs_EH] * 2, axis=1), saliency=np.arange(experts, 0, -1))
    assert groups_of("ream", layer, 2) == {frozenset(set(range(experts)) - {1, 3}), frozenset({1, 3})}


def test_those_that_no_centroid_can_hold_are_dropped():
    experts = 2 * CENTROID_CAPACITY + 3
    layer = observed(np.ones((experts, 2)), np.ones((experts, 2, 3)), saliency=np.arange(experts, 0, -1))
    groups = groups_of("ream", layer, 2)
    assert [len(group) for group in groups] == [CENTROID_CAPACITY] * 2
    assert frozenset.union(*groups) == set(range(2 * CENTROID_CAPACITY))


@pytest.mark.parametrize("name", MERGERS)
@pytest.mark.parametrize("count", range(1, 7))
def test_identical_experts_still_make_as_many_groups(name, count):
    layer = observed(np.ones((6, 3)), np.ones((6, 3, 2)), tokens=np.zeros(6))
    groups = groups_of(name, layer, count)
    assert (len(groups), sum(map(len, groups))) == (count, 6)


@pytest.mark.parametrize("name", MERGERS)
def test_an_expert_without_logits_or_outputs_is_like_no_other(name):
    logits_ET, outputs_ETH = np.ones((4, 3)), np.ones((4, 3, 2))
    logits_ET[1] = 0
    layer = observed(logits_ET, outputs_ETH, tokens=(0, 0, 2, 2))
    layer.sums["output_of_all"][1] = 0
    layer.sums["output_cosine"][1] = layer.sums["output_cosine"][:, 1] = 0
    groups = groups_of(name, layer, 2)
    assert frozenset.union(*groups) == {0, 1, 2, 3}
    if name not in ("m-smoe", "ream"):  # these two choose whom others join
        assert groups == {frozenset({1}), frozenset({0, 2, 3})}


@settings(max_examples=10)
@given(order=st.permutations(range(8)), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", MERGERS)
def test_permuting_experts_permutes_the_groups(name, order, seed):
    generator, order = np.random.default_rng(seed), list(order)
    centres = np.eye(4).repeat(2, axis=0)  # pairs, and noise that says who of a pair is who
    logits_ET = centres + generator.normal(0, 0.02, (8, 4))
    outputs_ETH = centres[:, np.newaxis, :] * 3 + generator.normal(0, 0.02, (8, 4, 4))
    tokens, saliency = generator.permutation(8) + 1, generator.permutation(8) + 1
    here = groups_of(name, observed(logits_ET, outputs_ETH, tokens, saliency), 4)
    there = groups_of(name, observed(logits_ET[order], outputs_ETH[order], tokens[order], saliency[order]), 4)
    assert {frozenset(order[expert] for expert in group) for group in there} == here
    assert groups_of(name, observed(logits_ET, outputs_ETH, tokens, saliency), 4) == here


def test_largest_clusters_are_split_where_there_are_too_few():
    assert make_groups([0, 0, 0, 1], 4) == [[0], [3], [2], [1]]


def test_cosines_of_nothing_are_no_nan():
    np.testing.assert_array_equal(cosine(np.zeros((2, 2))), np.eye(2))


def test_the_table_says_what_each_paper_does():
    assert {name: (row.align, row.router) for name, row in MERGERS.items()} == {
        "uncurl": (True, NEW),
        "m-smoe": (True, MEAN),
        "hc-smoe": (False, MEAN),
        "hc-smoe-cosine": (False, MEAN),
        "ream": (True, ROWS),
    }
