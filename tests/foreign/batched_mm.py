"""torch.onnx on transformers' batched_mm experts: the weights of each token's experts are gathered."""

from collections.abc import Mapping
from functools import partial

from torch import nn

from tests.foreign.decoders import block, decoder
from tests.foreign.exporters import dynamo, unoptimized
from tests.foreign.foreign import Foreign
from tests.foreign.inputs import BFLOAT_STATES, HALF_STATES, HIDDEN_STATES, TEXT
from tests.foreign.routers import (
    RENORMALISED,
    SIGMOID_GROUPS,
    SOFTMAX_BIAS,
    SOFTMAX_GROUPS,
    SPARSEMIXER,
    TOP_K_FIRST,
)

_batched = partial(Foreign, "batched_mm")


def _mixtral() -> nn.Module:
    return decoder("mixtral", "batched_mm")


def _half() -> nn.Module:
    return block("mixtral", "batched_mm").half()


def _bfloat() -> nn.Module:
    return block("mixtral", "batched_mm").bfloat16()


_gpt_oss = partial(block, "gpt_oss", "batched_mm")
_phimoe = partial(block, "phimoe", "batched_mm")
_ernie = partial(block, "ernie4_5_moe", "batched_mm")
_deepseek_v2 = partial(block, "deepseek_v2", "batched_mm")
_deepseek_v3 = partial(block, "deepseek_v3", "batched_mm")

BATCHED_MM: Mapping[str, Foreign] = {
    "batched_mm_mixtral_unoptimized": _batched(RENORMALISED, _mixtral, TEXT, unoptimized, layers=2),
    "batched_mm_mixtral_half": _batched(RENORMALISED, _half, HALF_STATES, dynamo),
    "batched_mm_mixtral_bfloat": _batched(RENORMALISED, _bfloat, BFLOAT_STATES, dynamo, runs=False),
    "batched_mm_gpt_oss_unoptimized": _batched(TOP_K_FIRST, _gpt_oss, HIDDEN_STATES, unoptimized),
    "batched_mm_phimoe": _batched(SPARSEMIXER, _phimoe, HIDDEN_STATES, dynamo),
    "batched_mm_phimoe_unoptimized": _batched(SPARSEMIXER, _phimoe, HIDDEN_STATES, unoptimized),
    "batched_mm_ernie4_5_moe": _batched(SOFTMAX_BIAS, _ernie, HIDDEN_STATES, dynamo),
    "batched_mm_ernie4_5_moe_unoptimized": _batched(SOFTMAX_BIAS, _ernie, HIDDEN_STATES, unoptimized),
    "batched_mm_deepseek_v2": _batched(SOFTMAX_GROUPS, _deepseek_v2, HIDDEN_STATES, dynamo),
    "batched_mm_deepseek_v3_unoptimized": _batched(SIGMOID_GROUPS, _deepseek_v3, HIDDEN_STATES, unoptimized),
}
