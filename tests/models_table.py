"""The one table of tiny models: every family, E=8, K=2, two MoE layers, random weights that route decisively."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from models.checkpoints import AUTO_CLASSES
from models.families import family
from models.moe_bert.configuration import MoeBertConfig
from models.moe_bert.modeling import MoeBertForSequenceClassification
from models.moe_layers import find_moe_layers
from models.vmoe.configuration import EXPERT_CHOICE, VMoeConfig
from models.vmoe.modeling import VMoeForImageClassification

EXPERTS, TOP_K, HIDDEN, WIDTH, VOCABULARY = 8, 2, 32, 48, 128

DENSE_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER: dict[str, Any] = {**DENSE_DECODER, "num_experts_per_tok": TOP_K}
_HEADS: dict[str, Any] = {"head_dim": HIDDEN // 4}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_TEN_CLASSES: dict[str, Any] = {"num_labels": 10}


def mixtral() -> PreTrainedModel:
    """Softmax, top-k, renormalised."""
    return _decoder(MixtralConfig(**_DECODER, num_local_experts=EXPERTS))


def qwen3_moe() -> PreTrainedModel:
    """Like mixtral, with ``norm_topk_prob`` and a head width of its own."""
    return _decoder(
        Qwen3MoeConfig(
            **_DECODER,
            **_HEADS,
            moe_intermediate_size=WIDTH,
            num_experts=EXPERTS,
            norm_topk_prob=True,
        )
    )


def olmoe() -> PreTrainedModel:
    """Softmax, top-k, not renormalised."""
    return _decoder(OlmoeConfig(**_DECODER, num_experts=EXPERTS))


def deepseek_v3() -> PreTrainedModel:
    """Sigmoid, selection bias, one of two groups, renormalised and scaled, a shared expert."""
    config = DeepseekV3Config(
        **{**_DECODER, **_LATENT_ATTENTION},
        moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=0,
    )
    return _decoder(config)


def gpt_oss() -> PreTrainedModel:
    """Top-k before softmax, router bias; transposed, interleaved, clamped experts with biases."""
    return _decoder(
        GptOssConfig(
            **_DECODER,
            **_HEADS,
            num_local_experts=EXPERTS,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    )


def granitemoe() -> PreTrainedModel:
    """Top-k before softmax."""
    return _decoder(GraniteMoeConfig(**_DECODER, num_local_experts=EXPERTS))


def vmoe() -> PreTrainedModel:
    """Images of 12 x 12 pixels in 4 patches; experts in blocks 1 and 3, not gated, with biases; not renormalised."""
    return _vmoe()


def vmoe_ensemble() -> PreTrainedModel:
    """Two members of 8 experts each, in both of two blocks: four layers for whatever ranks or prunes layers."""
    return _vmoe(ensemble_size=2, num_hidden_layers=2, moe_every=1)


def moe_bert() -> PreTrainedModel:
    """Texts in ten classes; experts in both layers, not gated, with biases; renormalised."""
    config = MoeBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_layers=[0, 1],
        **_TEN_CLASSES,
    )
    torch.manual_seed(0)
    return randomised(MoeBertForSequenceClassification(config))


TINY: Mapping[str, Callable[[], PreTrainedModel]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
    "granitemoe": granitemoe,
    "vmoe": vmoe,
    "moe_bert": moe_bert,
}


def auto_class(model: PreTrainedModel) -> Any:
    """The auto class of transformers that loads a checkpoint of ``model``."""
    return next(loader for suffix, loader in AUTO_CLASSES.items() if type(model).__name__.endswith(suffix))


def example_inputs(model: PreTrainedModel, batch: int, sequence: int, seed: int) -> dict[str, torch.Tensor]:
    """Random inputs: pixel values (batch, C, S, S), or ids and a mask without padding, both (batch, sequence).

    The decoder of an encoder-decoder gets about half as many ids.
    """
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        config = model.config
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, sequence), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)[:, : sequence // 2 + 1]
    return inputs


def vmoe_expert_choice() -> PreTrainedModel:
    """Both blocks have 8 experts, each of which takes two of the four tokens of an image."""
    return _vmoe(routing=EXPERT_CHOICE, capacity_factor=4.0, num_hidden_layers=2, moe_every=1)


def _vmoe(**routing: Any) -> PreTrainedModel:
    config = VMoeConfig(
        image_size=12,
        stem_channels=[8, 16],
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        **routing,
        **_TEN_CLASSES,
    )
    torch.manual_seed(0)
    return randomised(VMoeForImageClassification(config))


def _decoder(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return randomised(model)


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Matrices, and all that routers and experts hold, from normal(0, 0.2): routing with margins, biases not zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2, generator=generator)
    for layer in find_moe_layers(model):
        block = model.get_submodule(layer.name).state_dict()
        for name in family(model.config.model_type).routing_tensors:
            block[name].normal_(0, 0.2, generator=generator)
        for parameter in layer.experts.parameters():
            parameter.data.normal_(0, 0.2, generator=generator)
    nn.Module.eval(model)
    return model
