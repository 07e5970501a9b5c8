"""The one place for transformers' code that torch.onnx cannot translate, each with what computes the same."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v2 import modeling_deepseek_v2


@contextlib.contextmanager
def translatable() -> Iterator[None]:
    """Within the block DeepSeek-V2 turns queries and keys in real numbers, because ONNX hardly knows complex ones."""
    module: Any = modeling_deepseek_v2
    before = module.apply_rotary_emb
    module.apply_rotary_emb = _turned
    try:
        yield
    finally:
        module.apply_rotary_emb = before


def _turned(queries: Tensor, keys: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Channels 2 i and 2 i + 1 of ``(B, heads, S, D)`` times ``turns`` (B, S, D / 2), which are complex."""
    cos, sin = torch.view_as_real(turns).unsqueeze(1).unbind(-1)

    def turned(x: Tensor) -> Tensor:
        real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        pairs = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
        return pairs.flatten(-2).type_as(x)

    return turned(queries), turned(keys)
