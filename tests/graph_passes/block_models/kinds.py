"""The forms and the router kinds that tests go through, by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_spec.feasibility import Groups
from tests.graph_passes.block_models.forms import (
    batched_mm,
    dispatch,
    experts,
    fused,
    grouped,
    masked_loop,
    nonzero,
    stacked,
)
from tests.graph_passes.block_models.spec import Spec

FORMS = {
    "experts": experts.emit,
    "batched_mm": batched_mm.emit,
    "grouped": grouped.emit,
    "stacked": stacked.emit,
    "masked_loop": masked_loop.emit,
    "nonzero": nonzero.emit,
    "dispatch": dispatch.emit,
    "moe": fused.emit_moe,
    "qmoe": fused.emit_qmoe,
    "trt_moe": fused.emit_trt_moe,
}
FORM_NAMES = tuple(FORMS)

FORM_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "moe": {"interleaved": True},
    "qmoe": {"interleaved": True, "quantization": "int4", "hidden": 32, "width": 64},
    "trt_moe": {"separate": True},
}
"""What a form asks of the experts."""

SWITCH = {"selection": "argmax", "top_k": 1, "gates": "mask", "hit": "gates"}
NLLB = {
    "selection": "two_argmax",
    "renormalize": True,
    "eps": float(np.finfo(np.float32).eps),
    "eps_clips": True,
    "gates": "mask",
    "hit": "gates",
}

ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "softmax": {},
    "softmax_renormalised": {"renormalize": True},
    "softmax_masked": {"gates": "mask", "renormalize": True},
    "softmax_bias": {"selection_bias": True, "bias_row": True, "renormalize": True, "eps": 1e-12, "eps_clips": True},
    "softmax_groups": {"groups": Groups(4, 2, scored_by=1), "group_fill": 0.0, "scale": 1.5},
    "topk_first": {"topk_first": True, "router_bias": True},
    "topk_first_scattered": {"topk_first": True, "gates": "minus_inf"},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid_bias": {"score": "sigmoid", "selection_bias": True, "renormalize": True},
    "sigmoid_bias_eps": {"score": "sigmoid", "selection_bias": True, "renormalize": True, "eps": 1e-6},
    "sigmoid_bias_groups": {
        "score": "sigmoid",
        "selection_bias": True,
        "groups": Groups(2, 1),
        "renormalize": True,
        "scale": 2.5,
    },
    "sigmoid_biased_logits": {"score": "sigmoid", "topk_first": True, "selection_bias": True, "renormalize": True},
    "sqrtsoftplus": {"score": "sqrtsoftplus", "selection_bias": True, "renormalize": True, "eps": 1e-20, "scale": 1.5},
    "own_scales": {"renormalize": True, "own_scales": True},
    "sparsemixer": {"selection": "sparsemixer"},
    "switch": SWITCH,
    "switch_capacity": SWITCH | {"capacity": 3},
    "nllb": NLLB,
    "nllb_capacity": NLLB | {"capacity": 6},
    "vmoe": {"capacity": 6},
    "llama4": {
        "top_k": 1,
        "score": "sigmoid",
        "topk_first": True,
        "gates": "minus_inf",
        "weights_on": "input",
        "tiled": True,
    },
}
"""Fields of `Spec` for each kind of router in the field, and how its dense forms make their gates."""


def spec_of(form: str, router: str = "softmax", **fields: Any) -> Spec:
    """A block of this form and router kind; ``fields`` go before theirs."""
    return Spec(form=form, **{**FORM_FIELDS.get(form, {}), **ROUTERS[router], **fields})
