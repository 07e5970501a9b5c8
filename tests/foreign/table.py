"""The one table of foreign graphs: which model, which exporter, and what comes out."""

from collections.abc import Mapping
from functools import partial

from tests.foreign.batched_mm import BATCHED_MM
from tests.foreign.decoders import block, decoder
from tests.foreign.dispatch import DISPATCH
from tests.foreign.exporters import dynamo, fused
from tests.foreign.foreign import Foreign
from tests.foreign.gathered import GATHERED
from tests.foreign.grouped import GROUPED
from tests.foreign.inputs import HIDDEN_STATES, LAYER_INPUT, TEXT
from tests.foreign.lost import LOST
from tests.foreign.masked_loop import MASKED_LOOP
from tests.foreign.nonzero import NONZERO
from tests.foreign.routers import RENORMALISED, TOP_K_FIRST
from tests.foreign.stacked import STACKED

_moe = partial(Foreign, "moe", export=fused, runs=False)

FOREIGN: Mapping[str, Foreign] = {
    **GROUPED,
    **BATCHED_MM,
    **STACKED,
    **MASKED_LOOP,
    **NONZERO,
    **DISPATCH,
    **GATHERED,
    **LOST,
    "sorted_jetmoe": Foreign("sorted", TOP_K_FIRST, partial(decoder, "jetmoe"), TEXT, dynamo, layers=2),
    "moe_qwen3_moe": _moe(RENORMALISED, partial(decoder, "qwen3_moe"), TEXT),
    "moe_mixtral": _moe(RENORMALISED, partial(block, "mixtral", "batched_mm"), HIDDEN_STATES),
    "moe_granitemoe": _moe(TOP_K_FIRST, partial(block, "granitemoe", "batched_mm"), LAYER_INPUT),
}
