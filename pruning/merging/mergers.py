"""Mergers: which experts of one MoE layer become one. Each is a published method, less the training that follows it.

A merger ranks experts by scores and puts them into a given number of groups. Every group becomes its best expert, the
survivor; ties go to the lower id. All are deterministic. None sees routing groups: where a router has them, each
routing group is merged by itself (``pruning.merging.plan``).
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moe_spec.layer_plan import ALIAS, MEAN, NEW, ROUTERS, ROWS
from moe_spec.statistics import LayerStatistics
from pruning.criteria.moments import NAMED
from pruning.criteria.scores import Scores
from pruning.merging.similarity import cosine, logit_cosine, mean_outputs

Groups = list[list[int]]
"""Ids of the experts that become one. An expert that is in no group is dropped."""

CENTROID_CAPACITY = 16
"""REAM's C: the largest group, its centroid included."""


def spectral(layer: LayerStatistics, _scores: Scores, count: int) -> Groups:
    """Spectral clustering of ``S_ij = (1 + cos(z_i, z_j)) / 2``, z_i the logits of expert i over all tokens.

    UNCURL, https://arxiv.org/abs/2409.01483. The paper leaves open which Laplacian is meant and how k-means starts:
    here the symmetrically normalised one of scikit-learn, whose diagonal is 0, and a fixed seed.
    """
    from sklearn.cluster import SpectralClustering  # takes a second to import

    similarity_EE = (1 + logit_cosine(layer)) / 2
    clusters = SpectralClustering(n_clusters=count, affinity="precomputed", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct experts than clusters: make_groups splits them
        labels_E = clusters.fit_predict(similarity_EE)
    return make_groups(labels_E, count)


def nearest_dominant(layer: LayerStatistics, scores: Scores, count: int) -> Groups:
    """The ``count`` most frequent experts dominate; every other joins the one with the most cosine-similar logits.

    M-SMoE, https://arxiv.org/abs/2310.01334.
    """
    similarity_EE = logit_cosine(layer)
    dominant = _best(scores, count)
    groups = {expert: [expert] for expert in dominant}
    for expert in range(layer.experts):
        if expert not in groups:
            groups[max(dominant, key=lambda other: similarity_EE[expert, other])].append(expert)
    return list(groups.values())


def agglomerative_euclidean(layer: LayerStatistics, _scores: Scores, count: int) -> Groups:
    """Average-linkage clustering of the experts' mean outputs over all tokens, by Euclidean distance.

    HC-SMoE, https://arxiv.org/abs/2410.08589, as in its authors' code.
    """
    return _average_linkage(mean_outputs(layer), count, "euclidean")


def agglomerative_cosine(layer: LayerStatistics, _scores: Scores, count: int) -> Groups:
    """As ``agglomerative_euclidean``, by cosine distance: how https://arxiv.org/abs/2510.13999 restates HC-SMoE."""
    mean_EH = mean_outputs(layer)
    return _average_linkage(1 - cosine(mean_EH @ mean_EH.T), count, "precomputed")


def centroids(layer: LayerStatistics, scores: Scores, count: int) -> Groups:
    """The most salient experts are centroids and take their nearest, the most salient first.

    Distance is 1 minus the mean of two similarities: the cosine of the outputs, mean over all tokens, and the cosine
    of the logits. A group holds at most ``CENTROID_CAPACITY`` experts, so most centroids of a large layer stay alone,
    and those that no centroid takes are dropped; the authors' code refuses to. REAM, https://arxiv.org/abs/2604.04356.
    """
    similarity_EE = (layer["output_cosine"] / max(layer.token_count, 1) + logit_cosine(layer)) / 2
    chosen = _best(scores, count)
    free = set(range(layer.experts)) - set(chosen)
    groups = []
    for centroid in chosen:
        nearest = sorted(free, key=lambda expert: (-similarity_EE[centroid, expert], expert))
        groups.append([centroid, *nearest[: CENTROID_CAPACITY - 1]])
        free -= set(groups[-1])
    return groups


def make_groups(labels_E: Sequence[int] | npt.NDArray[np.integer], count: int) -> Groups:
    """Experts by cluster. Where experts are too alike for ``count`` clusters, the largest gives up its last expert.

    >>> make_groups([7, 7, 2, 7], 3)
    [[2], [0, 1], [3]]
    """
    labels_E = np.asarray(labels_E)
    groups: Groups = [np.flatnonzero(labels_E == label).tolist() for label in np.unique(labels_E)]
    while len(groups) < count:
        groups.append([max(groups, key=len).pop()])
    return groups


def _average_linkage(points: npt.NDArray[np.float64], count: int, metric: str) -> Groups:
    from sklearn.cluster import AgglomerativeClustering  # takes a second to import

    clusters = AgglomerativeClustering(n_clusters=count, linkage="average", metric=metric)
    return make_groups(clusters.fit_predict(points), count)


def _best(scores: Scores, count: int) -> list[int]:
    best: list[int] = np.argsort(-scores, kind="stable")[:count].tolist()
    return best


@dataclasses.dataclass(frozen=True)
class Merger:
    """One way to merge.

    Attributes:
        scores: ranks experts. The best of a group survives, and scores are the weights of the mean.
        group: puts the experts of a layer into so many groups, given their scores.
        align: whether the neurons of the others are permuted to those of the survivor first.
        dense: whether it needs statistics for which every expert runs on every token.
        router: what becomes of the router, unless the user says.
        published: the same in the paper.
        capacity: the most experts that become one; None for any number.
        deviations: other points in which this is not what the paper does.
    """

    scores: Callable[[LayerStatistics], Scores]
    group: Callable[[LayerStatistics, Scores, int], Groups]
    align: bool
    router: str
    published: str
    dense: bool = False
    capacity: int | None = None
    deviations: tuple[str, ...] = ()

    def notes(self, router: str) -> tuple[str, ...]:
        """What a user has to know of a merge with this router."""
        untrained = ("the router is drawn anew: until it is trained, it chooses at random",)
        other = (
            f"the paper's router (--router {self.published}): {ROUTERS[self.published]}. "
            f"This plan's: {ROUTERS[router]}",
        )
        return self.deviations + untrained * (router == NEW) + other * (router != self.published)


_FREQUENCY, _REAP = NAMED["frequency"], NAMED["reap"]
_COUNTS = (
    "the paper's counts come from one threshold over all layers, this plan's from its budget; scope global is nearest"
)
_SEQUENCE = "the paper looks at a layer once those before it are merged, this plan at the whole model"
_BY_WEIGHTS = "the paper aligns neurons by weights and activations, this plan by weights"
_SIMILARITY = (
    "the authors' code compares outputs by (1 + cos) / 2, and logits by the distance of their directions, as a share "
    "of the largest; this plan takes two cosines"
)

MERGERS: Mapping[str, Merger] = {
    "uncurl": Merger(_FREQUENCY, spectral, align=True, router=NEW, published=NEW),
    "m-smoe": Merger(_FREQUENCY, nearest_dominant, align=True, router=MEAN, published=ALIAS, deviations=(_COUNTS,)),
    "hc-smoe": Merger(_FREQUENCY, agglomerative_euclidean, align=False, router=MEAN, published=ALIAS, dense=True),
    "hc-smoe-cosine": Merger(_FREQUENCY, agglomerative_cosine, align=False, router=MEAN, published=ALIAS, dense=True),
    "ream": Merger(
        _REAP,
        centroids,
        align=True,
        router=ROWS,
        published=ROWS,
        dense=True,
        capacity=CENTROID_CAPACITY,
        deviations=(_SEQUENCE, _BY_WEIGHTS, _SIMILARITY),
    ),
}
"""Every merger, by the name that ``plan --criterion`` takes."""
