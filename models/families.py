"""The MoE families that moe-edge knows: where each keeps its router and its experts, and what it calls their counts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from moe_spec.errors import UserError, did_you_mean
from moe_spec.feasibility import Groups

Score = Literal["softmax", "sigmoid"]
"""What makes a router's scores of its logits."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture, as transformers 5 builds it.

    Attributes:
        model_type: ``model_type`` in config.json.
        experts_key: the config's name for E.
        router: attribute of the MoE block that holds the router, whose ``forward`` gives logits (T, E), weights (T, K)
            and expert ids (T, K).
        router_tensors: the router's parameters and buffers with E on axis 0.
        score: what the router makes of its logits, over all experts or over the selected ones only.
        experts: attribute of the MoE block that holds the experts; each of its parameters has E on axis 0.
        top_k_key: the config's name for K.
        experts_count: attribute of router and experts that holds E.
        top_k_count: attribute of block and router that holds K.
        group_keys: the config's names for ``Groups.count`` and ``Groups.selected``, if the router has groups.
        group_counts: the router's attributes that hold them.
    """

    model_type: str
    experts_key: str
    router: str
    router_tensors: tuple[str, ...] = ("weight",)
    score: Score = "softmax"
    experts: str = "experts"
    top_k_key: str = "num_experts_per_tok"
    experts_count: str = "num_experts"
    top_k_count: str = "top_k"
    group_keys: tuple[str, str] | None = None
    group_counts: tuple[str, str] | None = None

    def set_config_counts(self, config: Any, experts: int, top_k: int, groups: Groups | None) -> None:
        """Write E, K and the groups into a transformers config."""
        setattr(config, self.experts_key, experts)
        setattr(config, self.top_k_key, top_k)
        if self.group_keys is not None and groups is not None:
            setattr(config, self.group_keys[0], groups.count)
            setattr(config, self.group_keys[1], groups.selected)


_ROWS = (
    Family("vmoe", experts_key="num_experts", router="router"),
    Family("mixtral", experts_key="num_local_experts", router="gate"),
    Family("qwen3_moe", experts_key="num_local_experts", router="gate"),
    Family("olmoe", experts_key="num_experts", router="gate"),
    Family(
        "deepseek_v3",
        experts_key="n_routed_experts",
        router="gate",
        router_tensors=("weight", "e_score_correction_bias"),
        score="sigmoid",
        group_keys=("n_group", "topk_group"),
        group_counts=("num_group", "topk_group"),
    ),
    Family("gpt_oss", experts_key="num_local_experts", router="router", router_tensors=("weight", "bias")),
    Family("granitemoe", experts_key="num_local_experts", router="router"),
)

FAMILIES: Mapping[str, Family] = {row.model_type: row for row in _ROWS}
"""Every family, by model_type. A new one is a row here and a tiny model in tests/models_table.py."""


def family(model_type: str) -> Family:
    """The row of ``model_type``.

    Raises:
        UserError: no such family.

    >>> family("mixtral").router
    'gate'
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} is no MoE family that moe-edge knows", hint=did_you_mean(model_type, FAMILIES)
        )
    return FAMILIES[model_type]
