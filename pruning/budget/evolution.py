"""Search how many experts each layer keeps, with what ranks them left as it is.

EvoESAP, https://arxiv.org/abs/2603.06003, of which the abstract could be read: counts evolve at a fixed budget, and
expected acceptance (`pruning.budget.acceptance`) is their fitness. The rest here is ours:

1. A candidate has a count for each layer. The `PARENTS` fittest so far have children.
2. A child moves one, two, four ... levels from one layer to another; once, or twice, thrice ... ever more rarely.
3. Then it shrinks until the budget holds it, and grows until the budget holds no more, in layers drawn at random.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pruning.budget.scopes import Holds

Counts = tuple[int, ...]
Fitness = Callable[[Counts], float]

PARENTS = 4

DRAWS = 100
"""So many children of which none is new end the search."""


@dataclasses.dataclass(frozen=True)
class Searched:
    """What the search found.

    Attributes:
        counts: of experts each layer keeps.
        fitness: of them.
        of_starts: fitness of what it started from, by name.
        trials: candidates that were tried.
    """

    counts: Counts
    fitness: float
    of_starts: Mapping[str, float]
    trials: int


def evolve(
    starts: Mapping[str, Counts],
    levels: Sequence[Sequence[int]],
    holds: Holds,
    fitness: Fitness,
    *,
    trials: int,
    seed: int,
) -> Searched:
    """The fittest of at most ``trials`` candidates, never worse than any of ``starts``; of equals the first.

    Args:
        starts: at least one, all of which the budget holds.
        levels: for each layer the counts that it can keep, ascending.
        holds: whether the budget does; fewer experts never cost more.
        fitness: higher is better.
        trials: ``starts`` included; these are tried in any case.
        seed: of the swaps.
    """
    random = np.random.default_rng(seed)
    known = {counts: fitness(counts) for counts in dict.fromkeys(starts.values())}
    while len(known) < trials:
        parents = sorted(known, key=lambda counts: -known[counts])[:PARENTS]
        children = (_child(parents, levels, holds, random) for _ in range(DRAWS))
        child = next((child for child in children if child not in known), None)
        if child is None:
            break
        known[child] = fitness(child)
    best = max(known, key=lambda counts: known[counts])
    return Searched(best, known[best], {name: known[counts] for name, counts in starts.items()}, len(known))


def _child(
    parents: Sequence[Counts], levels: Sequence[Sequence[int]], holds: Holds, random: np.random.Generator
) -> Counts:
    """A candidate within the budget."""
    parent = parents[int(random.integers(len(parents)))]
    places = [of_layer.index(count) for of_layer, count in zip(levels, parent, strict=True)]
    highest = [len(of_layer) - 1 for of_layer in levels]

    def counts() -> Counts:
        return tuple(of_layer[place] for of_layer, place in zip(levels, places, strict=True))

    for _ in range(random.geometric(0.5)):
        _swap(places, highest, random)
    while not holds(counts()):
        places[random.choice([layer for layer, place in enumerate(places) if place > 0])] -= 1
    for layer in random.permutation(len(places)):
        while places[layer] < highest[layer]:
            places[layer] += 1
            if not holds(counts()):
                places[layer] -= 1
                break
    return counts()


def _swap(places: list[int], highest: Sequence[int], random: np.random.Generator) -> None:
    """One layer goes down some levels, and another goes up by as many."""
    if len(places) < 2:
        return
    down, up = random.choice(len(places), 2, replace=False)
    far = 2 ** random.integers(max(1, (highest[up] + 1).bit_length() - 1))
    size = min(int(far), places[down], highest[up] - places[up])
    places[down] -= size
    places[up] += size
