"""What a block computes, in float64 numpy and token by token."""

from math import erf

import numpy as np

from moe_spec.experts_op import Activation
from tests.graph_passes.block_models.spec import Spec
from tests.graph_passes.block_models.tensors import weights

Choice = list[tuple[int, float]]
"""(expert, weight) of one token, best first."""


def compute(spec: Spec, x: np.ndarray, keep: tuple[int, ...]) -> np.ndarray:
    """(T, H) or (B, S, H) like ``x``: the model when only ``keep`` can be selected, in every layer."""
    hidden = x.astype(np.float64).reshape(-1, spec.hidden)
    for index in range(spec.layers):
        tensors = {name: array.astype(np.float64) for name, array in weights(spec, index).items()}
        out = _layer(spec, tensors, hidden, keep)
        hidden = hidden + out if spec.layers > 1 else out
    return hidden.reshape(x.shape)


def _layer(spec: Spec, tensors: dict[str, np.ndarray], hidden: np.ndarray, keep: tuple[int, ...]) -> np.ndarray:
    choices = [_choose(spec, tensors, token, keep) for token in hidden]
    return np.stack([_mix(spec, tensors, token, choice) for token, choice in zip(hidden, choices, strict=True)])


def _mix(spec: Spec, tensors: dict[str, np.ndarray], x: np.ndarray, choice: Choice) -> np.ndarray:
    if spec.weights_on == "input":
        return sum((_expert(spec, tensors, weight * x, expert) for expert, weight in choice), np.zeros(spec.hidden))
    return sum((weight * _expert(spec, tensors, x, expert) for expert, weight in choice), np.zeros(spec.hidden))


def _choose(spec: Spec, tensors: dict[str, np.ndarray], x: np.ndarray, keep: tuple[int, ...]) -> Choice:
    logits = tensors["router"] @ x + (tensors["router_bias"] if spec.router_bias else 0.0)
    logits = np.where(np.isin(np.arange(spec.experts), keep), logits, -np.inf)
    top_k = min(spec.top_k, len(keep))
    scores = _score(spec, logits)
    ids = sorted(_selectable(spec, scores, logits, tensors, keep), key=lambda pair: -pair[1])[:top_k]
    chosen = [expert for expert, _ in ids]
    gates = _score(spec, logits[chosen]) if spec.topk_first else scores[chosen]
    if spec.renormalize:
        gates = gates / (max(gates.sum(), spec.eps) if spec.eps_clips else gates.sum() + spec.eps)
    return list(zip(chosen, spec.scale * gates, strict=True))


def _score(spec: Spec, logits: np.ndarray) -> np.ndarray:
    if spec.score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def _selectable(spec: Spec, scores, logits, tensors, keep) -> list[tuple[int, float]]:
    """(expert, rank) of every expert that may be chosen."""
    if spec.topk_first:
        return [(expert, logits[expert]) for expert in keep]
    choice = scores + (tensors["selection_bias"] if spec.selection_bias else 0.0)
    allowed = set(range(spec.experts))
    if spec.groups is not None:
        width, scored_by = spec.experts // spec.groups.count, spec.groups.scored_by

        def value(group: int) -> tuple[int, float]:
            members = sorted((choice[e] for e in keep if e // width == group), reverse=True)[:scored_by]
            return len(members), float(sum(members))

        best = sorted(range(spec.groups.count), key=value, reverse=True)[: spec.groups.selected]
        allowed = {expert for expert in range(spec.experts) if expert // width in best}
    return [(expert, choice[expert]) for expert in keep if expert in allowed]


def _expert(spec: Spec, tensors: dict[str, np.ndarray], x: np.ndarray, expert: int) -> np.ndarray:
    up, down = tensors["up"][expert], tensors["down"][expert]
    if spec.transposed:
        up, down = up.T, down.T
    projected = up @ x + (tensors["up_bias"][expert] if spec.biased else 0.0)
    activation, limit = spec.activation, spec.activation.limit or np.inf
    if spec.gated:
        gate, value = (projected[0::2], projected[1::2]) if spec.op.interleaved else np.split(projected, 2)
        value = np.clip(value, -limit, limit) + activation.up_offset
        middle = _act(activation, np.minimum(gate, limit)) * value
    else:
        middle = _act(activation, projected)
    return down @ middle + (tensors["down_bias"][expert] if spec.biased else 0.0)


def _act(activation: Activation, x: np.ndarray) -> np.ndarray:
    match activation.kind:
        case "silu":
            return x / (1 + np.exp(-activation.alpha * x))
        case "gelu":
            return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        case "relu":
            return np.maximum(x, 0)
        case _:
            return np.maximum(x, 0) ** 2
