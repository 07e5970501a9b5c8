"""Tiny decoders of transformers, and their MoE blocks alone: eight experts, a layer or two, no cache."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    JetMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from tests.foreign.inputs import HIDDEN, VOCABULARY
from tests.foreign.parts import EXPERTS, TOP_K, WIDTH, randomised

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOP_K: dict[str, Any] = {"num_experts_per_tok": TOP_K}
_QWEN3: dict[str, Any] = {
    **_TOP_K,
    "head_dim": HIDDEN // 2,
    "moe_intermediate_size": WIDTH,
    "num_experts": EXPERTS,
    "norm_topk_prob": True,
}
_LOCAL: dict[str, Any] = {**_TOP_K, "num_local_experts": EXPERTS}
_DEEPSEEK: dict[str, Any] = {
    **_TOP_K,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": WIDTH,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "n_group": 4,
    "topk_group": 2,
}
_ERNIE: dict[str, Any] = {
    "moe_k": TOP_K,
    "moe_num_experts": EXPERTS,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": WIDTH,
    "moe_layer_start_index": 0,
}

CONFIGS: Mapping[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**_DECODER | {"num_hidden_layers": 2}, **_LOCAL),
    "qwen3_moe": Qwen3MoeConfig(**_DECODER, **_QWEN3),
    "olmoe": OlmoeConfig(**_DECODER, **_TOP_K, num_experts=EXPERTS),
    "gpt_oss": GptOssConfig(
        **_DECODER, **_LOCAL, head_dim=8, sliding_window=8, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}
    ),
    "granitemoe": GraniteMoeConfig(**_DECODER, **_LOCAL),
    "phimoe": PhimoeConfig(**_DECODER, **_LOCAL),
    "ernie4_5_moe": Ernie4_5_MoeConfig(**_DECODER, **_ERNIE),
    "deepseek_v2": DeepseekV2Config(
        **_DECODER, **_DEEPSEEK, topk_method="group_limited_greedy", routed_scaling_factor=1.5
    ),
    "deepseek_v3": DeepseekV3Config(**_DECODER, **_DEEPSEEK),
    "jetmoe": JetMoeConfig(**_DECODER, **_LOCAL, kv_channels=8),
}


def decoder(name: str, experts_implementation: str | None = None) -> PreTrainedModel:
    """The whole model; ``experts_implementation`` as transformers names it, None for its default."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])  # the experts implementation is written into it
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if experts_implementation is not None:
        model.set_experts_implementation(experts_implementation)
    randomised(model)
    return model


def block(name: str, experts_implementation: str | None = None) -> nn.Module:
    """Its first MoE block alone."""
    layer = decoder(name, experts_implementation).model.layers[0]
    return getattr(layer, "mlp", None) or layer.block_sparse_moe
