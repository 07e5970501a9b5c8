"""The MoE families that moe-edge knows: where each keeps its router and its experts, and what it calls their counts."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

from moe_spec.errors import UserError
from moe_spec.feasibility import Groups

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
"""What makes a router's scores of its logits."""

GROUP_KEYS = ("n_group", "topk_group")
"""What configs call ``Groups.count`` and ``Groups.selected``."""

GROUP_COUNTS = ("num_group", "topk_group")
"""The attributes of routers that hold them."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture, as transformers 5 builds it.

    Attributes:
        model_type: ``model_type`` in config.json.
        text_type: the same for its language model alone, where transformers has that by itself.
        experts_key: the config's name for E.
        top_k_key: the config's name for K; empty where it has none.
        counts_in: the config's part that has both, if not the config itself.
        attention_experts: whether the attention has experts too, as many as ``experts_key`` says: a checkpoint cannot
            have fewer in the MLPs alone.
        router: attribute of the MoE block that holds the router, whose ``forward`` gives logits (T, E), weights (T, K)
            and expert ids (T, K), and more in some families.
        router_tensors: the router's parameters and buffers with a value or row for each expert: (E, ...) or (1, E);
            its weight is the first.
        block_tensors: those that the block itself holds, and gives to its router.
        score: what the router makes of its logits, over all experts or over the selected ones only.
        score_key: the config's name for ``score``, where it has one.
        answers: probabilities, where the router gives those instead of logits.
        experts: attribute of the MoE block that holds the experts; each of its parameters has E on axis 0.
        in_runs: whether files have the experts' weights as (E F, H), F rows of each.
        experts_count: attribute of router and experts that holds E.
        top_k_counts: names below the block of what holds K, where that is not ``top_k`` of router and block; what is in
            ``config`` all layers share.
        fixed_top_k: whether the router's code chooses K experts, whatever it is told.
        scored_by: how many experts score a group, if the router has groups.
    """

    model_type: str
    text_type: str | None = None
    experts_key: str = "num_experts"
    top_k_key: str = "num_experts_per_tok"
    counts_in: str | None = None
    attention_experts: bool = False
    router: str = "gate"
    router_tensors: tuple[str, ...] = ("weight",)
    block_tensors: tuple[str, ...] = ()
    score: Score = "softmax"
    score_key: str | None = None
    answers: Literal["logits", "probabilities"] = "logits"
    experts: str = "experts"
    in_runs: bool = False
    experts_count: str = "num_experts"
    top_k_counts: tuple[str, ...] = ()
    fixed_top_k: bool = False
    scored_by: int | None = None

    @property
    def holders_of_top_k(self) -> tuple[str, ...]:
        """Names below the block of what may hold K; the first one does."""
        return self.top_k_counts or (f"{self.router}.top_k", "top_k")

    @property
    def routing_tensors(self) -> tuple[str, ...]:
        """Names below the block of everything but experts that has a row for each expert; the router's weight first."""
        return (*(f"{self.router}.{name}" for name in self.router_tensors), *self.block_tensors)

    def counts(self, config: Any) -> Any:
        """The part of a transformers config that has E and K."""
        text = config.get_text_config()
        return text if self.counts_in is None else getattr(text, self.counts_in)

    def set_config_counts(self, config: Any, experts: int, top_k: int, groups: Groups | None) -> None:
        """Write E, K and the groups into a transformers config, or into that of its language model."""
        config = self.counts(config)
        setattr(config, self.experts_key, experts)
        if self.top_k_key:
            setattr(config, self.top_k_key, top_k)
        if groups is not None:
            for key, value in zip(GROUP_KEYS, (groups.count, groups.selected), strict=True):
                setattr(config, key, value)


_BIASED = ("weight", "e_score_correction_bias")
_ROUTED, _LOCAL = "n_routed_experts", "num_local_experts"

_ROWS = (
    Family("afmoe", router="router", router_tensors=("gate.weight",), block_tensors=("expert_bias",), score="sigmoid"),
    Family("aria", "aria_text", experts_key="moe_num_experts", top_k_key="moe_topk", router="router"),
    Family("axk1", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("axk2", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("bailing_hybrid", top_k_key="num_experts_per_token", router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("beam", router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("cohere2_moe", score_key="expert_selection_fn"),
    Family(
        "dbrx",
        experts_key="moe_num_experts",
        top_k_key="moe_top_k",
        counts_in="ffn_config",
        router="router",
        in_runs=True,
    ),
    Family("deepseek_ocr2", experts_key=_ROUTED, scored_by=1),
    Family("deepseek_v2", experts_key=_ROUTED, scored_by=1),
    Family("deepseek_v3", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("deepseek_v32", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("deepseek_v4", experts_key=_ROUTED, router_tensors=_BIASED, score_key="scoring_func"),
    Family("dots1", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("dots3_note", "dots3_note_text", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family(
        "ernie4_5_moe",
        experts_key="moe_num_experts",
        top_k_key="moe_k",
        router_tensors=("weight", "moe_statics.e_score_correction_bias"),
    ),
    Family(
        "ernie4_5_vl_moe",
        experts_key="moe_num_experts",
        top_k_key="moe_k",
        router_tensors=("weight", "moe_statics.e_score_correction_bias"),
    ),
    Family("exaone_moe", router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("flex_olmo"),
    Family("flint", score="sigmoid"),
    Family(
        "gemma4",
        "gemma4_text",
        top_k_key="top_k_experts",
        router="router",
        router_tensors=("proj.weight", "per_expert_scale"),
        answers="probabilities",
        top_k_counts=("router.config.top_k_experts",),
    ),
    Family("glm4_moe", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("glm4_moe_lite", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("glm4v_moe", "glm4v_moe_text", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("glm5_next", "glm5_next_text", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("glm_moe_dsa", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("gpt_oss", experts_key=_LOCAL, router="router", router_tensors=("weight", "bias")),
    Family("granitemoe", experts_key=_LOCAL, router="router"),
    Family("granitemoe_swa", experts_key=_LOCAL, router="router"),
    Family("granitemoehybrid", experts_key=_LOCAL, router="router"),
    Family("granitemoeshared", experts_key=_LOCAL, router="router"),
    Family("hunyuan_v1_moe", top_k_key="moe_topk", router_tensors=("wg.weight",)),
    Family("hy_v3", block_tensors=("e_score_correction_bias",), score="sigmoid"),
    Family("hy_v4", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("inkling2", "inkling2_text", experts_key=_ROUTED, router_tensors=_BIASED, score_key="scoring_func"),
    Family("jamba", router="router"),
    Family("jetmoe", experts_key=_LOCAL, attention_experts=True, router="router"),
    Family("kimi_linear", top_k_key="num_experts_per_token", router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("kolibri1", experts_key=_LOCAL, router_tensors=_BIASED, score="sigmoid"),
    Family("laguna", router_tensors=_BIASED, score="sigmoid"),
    Family("lfm2_moe", block_tensors=("expert_bias",), score="sigmoid"),
    Family("llama4", "llama4_text", experts_key=_LOCAL, router="router", score="sigmoid"),
    Family("mellum", experts_key=_LOCAL),
    Family("mimo_v2_flash", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("minimax", experts_key=_LOCAL),
    Family("minimax_m2", experts_key=_LOCAL, block_tensors=("e_score_correction_bias",), score="sigmoid"),
    Family("minimax_m3_vl", "minimax_m3_vl_text", experts_key=_LOCAL, router_tensors=_BIASED, score="sigmoid"),
    Family("mistral4", experts_key=_ROUTED, scored_by=2),
    Family("mistral_large4", "mistral_large4_text", experts_key=_ROUTED, scored_by=2),
    Family("mixtral", experts_key=_LOCAL),
    Family("moe_bert", router="router"),
    Family("muse_spark", "muse_spark_text", experts_key=_LOCAL, router_tensors=_BIASED, score="sigmoid"),
    Family("nemotron_h", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("olmoe"),
    Family(
        "openai_privacy_filter",
        experts_key=_LOCAL,
        router="router",
        router_tensors=("weight", "bias"),
        top_k_counts=("router.top_k", "num_experts"),  # the block's num_experts is K
    ),
    Family("phimoe", experts_key=_LOCAL, router="router", fixed_top_k=True),
    Family("qwen2_moe"),
    Family("qwen3_5_moe", "qwen3_5_moe_text"),
    Family("qwen3_moe", experts_key=_LOCAL),
    Family("qwen3_next"),
    Family("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    Family("qwen3_vl_moe", "qwen3_vl_moe_text", experts_key=_LOCAL),
    Family("qwen4_exp", "qwen4_exp_text"),
    Family("solar_open", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid", scored_by=2),
    Family("step3p7", experts_key=_ROUTED, router_tensors=_BIASED, score="sigmoid"),
    Family("switch_transformers", top_k_key="", router="router", fixed_top_k=True),
    Family("unlimited_ocr", experts_key=_ROUTED, scored_by=1),
    Family("vmoe", router="router"),
)

DENSE = ("llama", "mistral")
"""Decoders without experts that are read too, to be upcycled: Mixtral's layers are theirs, but for the experts."""

FAMILIES: Mapping[str, Family] = {row.model_type: row for row in _ROWS}
"""Every family, by model_type. A new one is a row here and a tiny config in tests/families/configs.py."""

PLAIN = Family("plain_module", router="router", router_tensors=("weight", "bias"))
"""Any torch module with `models.moe_block.SparseMoe` in it; routers without a bias get one of zeros."""

_BY_TYPE = {**FAMILIES, PLAIN.model_type: PLAIN, **{row.text_type: row for row in _ROWS if row.text_type is not None}}


def family(model_type: str) -> Family:
    """The row of ``model_type``.

    Raises:
        UserError: no such family.

    >>> family("mixtral").router
    'gate'
    >>> family("qwen3_vl_moe_text").model_type
    'qwen3_vl_moe'
    """
    if model_type not in _BY_TYPE:
        close = difflib.get_close_matches(model_type, _BY_TYPE, n=1)
        nearest = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"model_type {model_type!r} is no MoE family that moe-edge knows",
            hint=f"{nearest}`moe-edge families` lists them; any other module is adapted in a few lines of Python: "
            "docs/howto/any-torch-module.md; CONTRIBUTING.md says how to add a family",
        )
    return _BY_TYPE[model_type]


def is_known(model_type: str) -> bool:
    """Whether `family` has a row for it."""
    return model_type in _BY_TYPE


def known_type(config: Any) -> str:
    """The ``model_type`` by which `family` knows a transformers config, else its own.

    A config class of a checkpoint's own code is of the family whose config class it extends, or of the one that
    config.json names: ``"moe_family": "mixtral"``.
    """
    own: str = config.model_type
    extended = (getattr(base, "model_type", "") for base in type(config).__mro__)
    names = (own, getattr(config, "moe_family", ""), *extended) if config.is_custom_code() else (own,)
    return next(filter(is_known, names), own)


def family_of(config: Any) -> Family:
    """The row of a transformers config, see `known_type`.

    Raises:
        UserError: no such family.
    """
    return family(known_type(config))
