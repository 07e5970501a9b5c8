"""What a model computes, in float64 numpy and token by token."""

from collections.abc import Sequence

import numpy as np

from tests.graph_passes.block_models.reference.experts import one_expert
from tests.graph_passes.block_models.reference.routing import Choice, route
from tests.graph_passes.block_models.spec import Spec
from tests.graph_passes.block_models.tensors import weights


def compute(
    spec: Spec,
    x: np.ndarray,
    keep: tuple[int, ...],
    *others: tuple[int, ...],
    full: tuple[int, ...] = (),
    means: Sequence[np.ndarray] = (),
) -> np.ndarray:
    """Like ``x`` (T, H) or (B, S, H): the model when only ``keep`` can be selected, in every layer or the first.

    In the layers ``full`` all can be selected, and only ``keep`` give something; or the others their rows of ``means``
    (D, H), one for each layer.
    """
    everyone = tuple(range(spec.experts))
    keeps = (keep, *others) if others else (keep,) * spec.layers
    hidden = x.astype(np.float64).reshape(-1, spec.hidden)
    for index in range(spec.layers):
        tensors = {name: array.astype(np.float64) for name, array in weights(spec, index).items()}
        selectable = everyone if index in full else keeps[index]
        choices = route(spec, tensors, hidden, selectable, sequence=x.shape[-2])
        given = [{expert: choice[expert] for expert in choice if expert in keeps[index]} for choice in choices]
        out = np.stack([_mix(spec, tensors, *token) for token in zip(hidden, given, strict=True)])
        if means:
            dropped = [expert for expert in everyone if expert not in keeps[index]]
            out += np.array([[choice.get(expert, 0) for expert in dropped] for choice in choices]) @ means[index]
        hidden = hidden + out if spec.layers > 1 else out
    return hidden.reshape(x.shape)


def _mix(spec: Spec, tensors: dict[str, np.ndarray], x: np.ndarray, choice: Choice) -> np.ndarray:
    """(H,): the chosen experts' outputs, weighed; 0 where none took the token."""
    out = np.zeros(spec.hidden)
    for expert, weight in choice.items():
        if spec.weights_on == "input":
            out += one_expert(spec, tensors, weight * x, expert)
        else:
            out += weight * one_expert(spec, tensors, x, expert)
    return out
