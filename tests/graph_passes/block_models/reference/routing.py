"""Which experts a token is given to and with what weights, when only some can be selected."""

from collections import Counter

import numpy as np

from tests.graph_passes.block_models.spec import Spec

Choice = dict[int, float]
"""Weight by expert of one token, best first."""

Tensors = dict[str, np.ndarray]


def route(spec: Spec, tensors: Tensors, hidden: np.ndarray, keep: tuple[int, ...], sequence: int) -> list[Choice]:
    """The choice of each of the tokens (T, H), which are sequences of ``sequence`` tokens."""
    bias = tensors["router_bias"] if spec.router_bias else 0.0
    dropped = [expert for expert in range(spec.experts) if expert not in keep]
    logits = hidden @ tensors["router"].T + bias
    logits[:, dropped] = -np.inf
    choices = [_choose(spec, tensors, row, keep) for row in logits]
    if spec.selection == "two_argmax":  # NLLB counts over all sequences, and renormalises what is left
        return [_weighed(spec, choice) for choice in _within_capacity(spec, choices)]
    starts = range(0, len(choices), sequence)
    return [choice for start in starts for choice in _within_capacity(spec, choices[start : start + sequence])]


def _choose(spec: Spec, tensors: Tensors, logits: np.ndarray, keep: tuple[int, ...]) -> Choice:
    top_k = min(spec.top_k, len(keep))
    if spec.selection == "sparsemixer":
        return {expert: spec.scale * weight for expert, weight in _sparsemixer(spec, logits, top_k).items()}
    scores = score(spec, logits)
    ranks = _selectable(spec, scores, logits, tensors, keep)
    chosen = sorted(ranks, key=lambda expert: -ranks[expert])[:top_k]
    weights = score(spec, logits[chosen]) if spec.topk_first else scores[chosen]
    choice = dict(zip(chosen, weights.tolist(), strict=True))
    choice = choice if spec.selection == "two_argmax" else _weighed(spec, choice)
    own_E = tensors["own_scales"] if spec.own_scales else np.ones(spec.experts)
    return {expert: weight * own_E[expert] for expert, weight in choice.items()}


def _weighed(spec: Spec, choice: Choice) -> Choice:
    """Renormalised and scaled."""
    summed = 1.0
    if spec.renormalize:
        summed = sum(choice.values())
        summed = max(summed, spec.eps) if spec.eps_clips else summed + spec.eps
    return {expert: spec.scale * weight / summed for expert, weight in choice.items()}


def score(spec: Spec, logits: np.ndarray) -> np.ndarray:
    """Of the logits (n,) together."""
    if spec.score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    if spec.score == "sqrtsoftplus":
        return np.sqrt(np.logaddexp(0, logits))
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def _selectable(spec: Spec, scores, logits, tensors: Tensors, keep: tuple[int, ...]) -> Choice:
    """What every expert that may be chosen is ranked by."""
    ranked = logits if spec.topk_first else scores
    choice = ranked + (tensors["selection_bias"] if spec.selection_bias else 0.0)
    if spec.groups is None:
        return {expert: choice[expert] for expert in keep}
    width, scored_by = spec.experts // spec.groups.count, spec.groups.scored_by

    def value(group: int) -> tuple[int, float]:
        members = sorted((choice[e] for e in keep if e // width == group), reverse=True)[:scored_by]
        return len(members), float(sum(members))

    best = sorted(range(spec.groups.count), key=value, reverse=True)[: spec.groups.selected]
    return {expert: choice[expert] for expert in keep if expert // width in best}


def _sparsemixer(spec: Spec, logits: np.ndarray, top_k: int) -> Choice:
    """The largest logits one after the other, each by its share among those within the jitter of it."""
    choice: Choice = {}
    for _ in range(top_k):
        others = [expert for expert in range(spec.experts) if expert not in choice and logits[expert] > -np.inf]
        first = max(others, key=lambda expert: logits[expert])
        largest = logits[first]
        near = [e for e in others if (largest - logits[e]) / max(abs(logits[e]), largest) <= 2 * spec.jitter_eps]
        choice[first] = float(1 / np.exp(logits[near] - largest).sum())
    return choice


def _within_capacity(spec: Spec, choices: list[Choice]) -> list[Choice]:
    """What is left when experts take no more than their capacity: all first choices, then all second ones, in order."""
    if spec.capacity is None:
        return choices
    taken: Counter[int] = Counter()
    kept: list[Choice] = [{} for _ in choices]
    for rank in range(spec.top_k):
        for choice, left in zip(choices, kept, strict=True):
            for expert, weight in list(choice.items())[rank : rank + 1]:
                taken[expert] += 1
                if taken[expert] <= spec.capacity:
                    left[expert] = weight
    return kept
