"""transformers' own exporter: tokens sorted by expert, one run of them and one product an expert."""

from collections.abc import Mapping
from functools import partial

from tests.foreign.decoders import block, decoder
from tests.foreign.exporters import transformers
from tests.foreign.foreign import Foreign
from tests.foreign.inputs import HIDDEN_STATES, TEXT
from tests.foreign.routers import (
    NOT_RENORMALISED,
    RENORMALISED,
    SIGMOID_GROUPS,
    SOFTMAX_GROUPS,
    SPARSEMIXER,
    TOP_K_FIRST,
)

_grouped = partial(Foreign, "grouped", export=transformers)

GROUPED: Mapping[str, Foreign] = {
    "grouped_mixtral": _grouped(RENORMALISED, partial(decoder, "mixtral"), TEXT, layers=2),
    "grouped_olmoe": _grouped(NOT_RENORMALISED, partial(block, "olmoe"), HIDDEN_STATES),
    "grouped_gpt_oss": _grouped(TOP_K_FIRST, partial(block, "gpt_oss"), HIDDEN_STATES),
    "grouped_phimoe": _grouped(SPARSEMIXER, partial(block, "phimoe"), HIDDEN_STATES),
    "grouped_deepseek_v2": _grouped(SOFTMAX_GROUPS, partial(block, "deepseek_v2"), HIDDEN_STATES),
    "grouped_deepseek_v3": _grouped(SIGMOID_GROUPS, partial(block, "deepseek_v3"), HIDDEN_STATES),
}
