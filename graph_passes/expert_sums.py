"""What experts.onnx shows of one batch, as the sums that ``moe_spec.statistics`` defines."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from graph_passes.record.block import ON_OUTPUT, MoEBlock
from moe_spec.statistics import LayerStatistics

Floats = npt.NDArray[np.float64]


class Seen(NamedTuple):
    """The four outputs of a layer, as `graph_passes.variants.observe_experts` orders them.

    Attributes:
        logits_TE: of the router, biases included.
        ids_TK: the experts that were selected.
        gates_TK: the weights that multiply their outputs.
        norms_TK: L2 norms of these outputs.
    """

    logits_TE: npt.NDArray[Any]
    ids_TK: npt.NDArray[Any]
    gates_TK: npt.NDArray[Any]
    norms_TK: npt.NDArray[Any]


def _softmax(logits_TE: Floats) -> Floats:
    exponentials: Floats = np.exp(logits_TE - logits_TE.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def _sigmoid(logits_TE: Floats) -> Floats:
    return np.asarray(0.5 + 0.5 * np.tanh(0.5 * logits_TE))  # no exponential that could overflow


def _sqrtsoftplus(logits_TE: Floats) -> Floats:
    return np.asarray(np.sqrt(np.logaddexp(0.0, logits_TE)))


SCORES: Mapping[str, Callable[[Floats], Floats]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
}
"""Of the kinds of routers that score all experts; a sparsemixer scores only the selected ones."""


def layer_statistics(block: MoEBlock, seen: Seen, valid_T: npt.NDArray[np.bool_]) -> LayerStatistics:
    """The sums of one layer over the tokens that are ``valid_T``.

    What an expert gives is seen as a norm only, so statistics of whole output vectors are missing. Where weights
    multiply the experts' inputs, the norm is none of what the expert gives without, and those of norms are missing too.
    A slot that a capacity dropped counts as selected, with weight 0.
    """
    logits_TE, ids_TK, gates_TK, norms_TK = (values[valid_T] for values in seen)
    logits_TE = logits_TE.astype(np.float64)
    gates_S, norms_S = gates_TK.ravel().astype(np.float64), norms_TK.ravel().astype(np.float64)
    terms = {"tokens": np.ones_like(gates_S), "gate": gates_S, "gate_squared": gates_S**2}
    if block.weights_on == ON_OUTPUT:
        terms |= {
            "output_norm": norms_S,
            "output_norm_squared": norms_S**2,
            "gated_norm": gates_S * norms_S,
            "gated_norm_squared": (gates_S * norms_S) ** 2,
        }
    ids_S, experts = ids_TK.ravel(), block.num_experts
    sums: dict[str, Floats] = {key: np.bincount(ids_S, term, experts).astype(float) for key, term in terms.items()}
    if block.router.score in SCORES:
        sums["probability"] = SCORES[block.router.score](logits_TE).sum(axis=0)
    reachable_TE = np.where(np.isneginf(logits_TE), 0.0, logits_TE)  # a masked expert is like no other
    sums["logit_gram"] = reachable_TE.T @ reachable_TE
    return LayerStatistics(
        name=block.name,
        experts=experts,
        top_k=block.router.top_k,
        token_count=int(valid_T.sum()),
        sums=sums,
        groups=block.router.groups,
    )
