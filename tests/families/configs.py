"""A tiny random model of every family, as data: what each config needs beyond the sizes that all of them share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models.adapters import adapted
from models.families import Family, family
from tests.models_table import EXPERTS, HIDDEN, TINY, TOP_K, VOCABULARY, WIDTH, randomised

SIZES: Mapping[str, Any] = {
    "bos_token_id": 1,
    "decoder_sparse_step": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "head_dim": HIDDEN // 4,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "kv_lora_rank": 16,
    "max_position_embeddings": 64,
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    "moe_intermediate_size": WIDTH,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 0,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_dense_layers": 0,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_shared_experts": 1,
    "pad_token_id": 0,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "shared_expert_intermediate_size": WIDTH,
    "topk_group": 1,
    "v_head_dim": 8,
    "vocab_size": VOCABULARY,
}
"""What a config is given of this: the fields that its class has."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {},
    "aria": {},
    "axk1": {},
    "axk2": {},
    "bailing_hybrid": _HYBRID,
    "beam": {},
    "cohere2_moe": {},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "d_model": HIDDEN,
        "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K},
        "max_seq_len": 64,
        "n_heads": 4,
        "n_layers": 2,
    },
    "deepseek_ocr2": {},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v32": {},
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"]},
    "dots1": {},
    "dots3_note": {},
    "ernie4_5_moe": {},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [WIDTH, WIDTH],
        "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
    },
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4": {"enable_moe_block": True, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 0},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm4v_moe": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "glm5_next": {**_HYBRID, "qk_rope_head_dim": 0},
    "glm_moe_dsa": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_heads": 4,
    },
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2": {},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "use_mamba_kernels": False,
    },
    "jetmoe": {"kv_channels": HIDDEN // 4, "num_key_value_heads": 2},
    "kimi_linear": _HYBRID,
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"intermediate_size_mlp": WIDTH, "num_key_value_heads": 2},
    "mellum": {},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl": {},
    "mistral4": {},
    "mistral_large4": {},
    "muse_spark": {"moe_hidden_size": HIDDEN},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "openai_privacy_filter": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen3_omni_moe": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "qwen3_vl_moe": {},
    "qwen4_exp": {
        **_HYBRID,
        "indexer_budget": 64,
        "indexer_compress_ratio": 1,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
    },
    "solar_open": {},
    "step3p7": {"layer_types": ["full_attention", "sliding_attention"], "share_expert_dim": WIDTH, "sliding_window": 8},
    "switch_transformers": {
        "d_ff": WIDTH,
        "d_kv": HIDDEN // 4,
        "d_model": HIDDEN,
        "decoder_start_token_id": 0,
        "expert_capacity": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_layers": 2,
        "num_sparse_decoder_layers": 1,
        "num_sparse_encoder_layers": 1,
    },
    "unlimited_ocr": {},
}
"""Of the families that tests.models_table has no model for."""

_SAM = {
    "downsample_channels": [16, 16],
    "global_attn_indexes": [1],
    "hidden_size": 16,
    "image_size": 32,
    "mlp_dim": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "output_channels": 8,
    "patch_size": 4,
}
_ENCODER = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}

AROUND: Mapping[str, Mapping[str, Any]] = {
    "deepseek_ocr2": {"vision_config": {"encoder_config": {**_ENCODER, "num_key_value_heads": 2}, "sam_config": _SAM}},
    "ernie4_5_vl_moe": {"vision_config": _VISION},
    "glm4v_moe": {"vision_config": {**_VISION, "image_size": 28, "out_hidden_size": HIDDEN}},
    "glm5_next": {
        "vision_config": {
            **_VISION,
            "image_size": 28,
            "out_hidden_size": HIDDEN,
            "projection_intermediate_size": 16,
        }
    },
    "mistral_large4": {
        "vision_config": {
            "head_dim": 8,
            "hidden_size": 16,
            "image_size": 28,
            "intermediate_size": 16,
            "model_type": "pixtral",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 14,
        }
    },
    "muse_spark": {
        "audio_config": {
            "depths": [1],
            "hidden_sizes": [16],
            "num_hidden_layers": 1,
            "out_hidden_size": HIDDEN,
            "patch_sizes": [16],
        },
        "out_hidden_size": 64,
        "projector_hidden_size": 16,
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        },
    },
    "qwen3_omni_moe": {
        "audio_config": {
            "d_model": 16,
            "downsample_hidden_size": 8,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "encoder_layers": 1,
            "output_dim": HIDDEN,
        },
        "vision_start_token_id": 3,
        "vision_config": {**_VISION, "deepstack_visual_indexes": [], "out_hidden_size": HIDDEN},
    },
    "qwen3_vl_moe": {
        "vision_config": {
            **_VISION,
            "deepstack_visual_indexes": [],
            "num_position_embeddings": 16,
            "out_hidden_size": HIDDEN,
        }
    },
    "step3p7": {
        "vision_config": {
            "hidden_size": 16,
            "image_size": 28,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
        }
    },
    "unlimited_ocr": {"vision_config": {"encoder_config": _ENCODER, "sam_config": _SAM}},
}
"""What is around the language model of those that transformers has as a whole only, or without a head by itself."""

AUTO = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_MAPPING,
)
"""Where the class of a config's model is looked for, in this order."""


def tiny(model_type: str) -> PreTrainedModel:
    """The tiny model of a family: its language model alone, where transformers has that by itself."""
    if model_type in TINY:
        return TINY[model_type]()
    row = family(model_type)
    config_class: Any = CONFIG_MAPPING[row.text_type or model_type]
    if model_type in AROUND:
        config_class = config_class if "text_config" in config_class.sub_configs else CONFIG_MAPPING[model_type]
        text = _sizes(config_class.sub_configs["text_config"], row)
        config = config_class(text_config={**text, **CONFIGS[model_type]}, **AROUND[model_type])
    else:
        config = config_class(**{**_sizes(config_class, row), **CONFIGS[model_type]})
    model_class: Any = next(mapping[config_class] for mapping in AUTO if config_class in mapping)
    torch.manual_seed(0)
    with adapted(model_type):
        model: PreTrainedModel = model_class(config)
    return randomised(model)


def _sizes(config_class: type[PreTrainedConfig], row: Family) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(config_class)}
    shared = {name: value for name, value in SIZES.items() if name in fields}
    counts = {row.experts_key: EXPERTS, row.top_k_key: TOP_K}
    return {**shared, **{key: count for key, count in counts.items() if key and row.counts_in is None}}
