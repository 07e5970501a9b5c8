"""Decoders without experts, to be upcycled."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.models_table import DENSE_DECODER

SIZES: dict[str, Any] = {**DENSE_DECODER, "initializer_range": 0.2}


def llama(seed=0, dtype=torch.float32, **changes) -> Any:
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 777.0}
    config = LlamaConfig(**SIZES | {"rope_parameters": rope} | changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
