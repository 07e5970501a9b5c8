import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pruning.budget.evolution import evolve

LEVELS = [list(range(2, 9))] * 4


def experts(most):
    return lambda counts: sum(counts) <= most


def test_it_finds_the_best_of_all_where_that_is_found_by_swaps():
    worth = np.random.default_rng(0).random((4, 9)).cumsum(axis=1)

    def fitness(counts):
        return float(sum(worth[layer, count] for layer, count in enumerate(counts)))

    best = max((counts for counts in itertools.product(*LEVELS) if sum(counts) <= 16), key=fitness)
    found = evolve({"layer": (4, 4, 4, 4)}, LEVELS, experts(16), fitness, trials=60, seed=0)
    assert found.counts == best
    assert found.fitness == fitness(best) > found.of_starts["layer"] == fitness((4, 4, 4, 4))


@given(st.integers(0, 2**16), st.integers(8, 32), st.integers(1, 12))
def test_it_is_never_worse_than_its_starts_and_stays_within_the_budget(seed, most, trials):
    noise = np.random.default_rng(seed).random((9, 9, 9, 9))
    even = (most // 4,) * 4
    greedy = (min(8, most - 6), 2, 2, 2)
    tried = []

    def fitness(counts):
        tried.append(counts)
        return float(noise[counts])

    found = evolve({"layer": even, "global": greedy}, LEVELS, experts(most), fitness, trials=trials, seed=seed)
    assert found.of_starts == {"layer": noise[even], "global": noise[greedy]}
    assert found.fitness == noise[found.counts] == max(noise[counts] for counts in tried)
    assert len(set(tried)) == len(tried) == found.trials <= max(trials, 2)
    assert all(sum(counts) <= most and all(2 <= count <= 8 for count in counts) for counts in tried)


def test_the_same_seed_finds_the_same():
    noise = np.random.default_rng(1).random((9, 9, 9, 9))
    runs = [
        evolve({"layer": (5,) * 4}, LEVELS, experts(20), lambda counts: float(noise[counts]), trials=20, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_it_ends_where_nothing_new_is_left():
    found = evolve({"layer": (3, 3)}, LEVELS[:2], experts(6), lambda counts: -abs(counts[0] - 4), trials=1000, seed=0)
    assert (found.counts, found.trials) == ((4, 2), 3)
    alone = evolve({"layer": (3,)}, LEVELS[:1], experts(3), sum, trials=1000, seed=0)
    assert (alone.counts, alone.trials) == ((3,), 1)


def test_of_equals_the_first_stays():
    found = evolve({"layer": (4,) * 4, "global": (6, 6, 2, 2)}, LEVELS, experts(16), lambda _: 0.5, trials=9, seed=0)
    assert found.counts == (4, 4, 4, 4)


def test_layers_that_cost_differently_are_filled_up():
    def holds(counts):
        return 10 * counts[0] + counts[1] <= 46  # (4, 6) or (3, 8): never room for one more

    found = evolve({"layer": (3, 3)}, LEVELS[:2], holds, lambda counts: counts[0] + counts[1], trials=50, seed=0)
    assert found.counts == (3, 8)
