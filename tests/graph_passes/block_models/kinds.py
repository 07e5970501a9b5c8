"""The forms and the router kinds that tests go through, by name."""

from collections.abc import Mapping
from typing import Any

from moe_spec.feasibility import Groups
from tests.graph_passes.block_models.forms import batched_mm, experts, grouped, masked_loop, nonzero, stacked

FORMS = {
    "experts": experts.emit,
    "batched_mm": batched_mm.emit,
    "grouped": grouped.emit,
    "stacked": stacked.emit,
    "masked_loop": masked_loop.emit,
    "nonzero": nonzero.emit,
}
FORM_NAMES = tuple(FORMS)

ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "softmax": {},
    "softmax_renormalised": {"renormalize": True},
    "softmax_masked": {"gates": "mask", "renormalize": True},
    "softmax_bias": {"selection_bias": True, "bias_row": True, "renormalize": True, "eps": 1e-12, "eps_clips": True},
    "softmax_groups": {"groups": Groups(4, 2, scored_by=1), "group_fill": 0.0, "scale": 1.5},
    "topk_first": {"topk_first": True, "router_bias": True},
    "topk_first_scattered": {"topk_first": True, "gates": "minus_inf"},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid_bias": {"score": "sigmoid", "selection_bias": True, "renormalize": True, "eps": 1e-6},
    "sigmoid_bias_groups": {
        "score": "sigmoid",
        "selection_bias": True,
        "groups": Groups(2, 1),
        "renormalize": True,
        "scale": 2.5,
    },
    "llama4": {
        "top_k": 1,
        "score": "sigmoid",
        "topk_first": True,
        "gates": "minus_inf",
        "weights_on": "input",
        "tiled": True,
    },
}
"""Fields of `Spec` for each kind of router in the field; with it the gates that its dense forms use."""
