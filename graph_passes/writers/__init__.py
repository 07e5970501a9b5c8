"""Emit one form of a ``MoEBlock``. One file a form, each with ``write(emitter, block) -> (out, routing)``.

A writer that cannot express every block has ``why_not(block) -> reason | None`` too.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType

from graph_passes.block import MoEBlock
from graph_passes.writers import dense, ffn, gather, moe, qmoe, sorted_runs, trt_moe

WRITERS: Mapping[str, ModuleType] = {
    "dense": dense,
    "sorted": sorted_runs,
    "gather": gather,
    "ffn": ffn,
    "moe": moe,
    "qmoe": qmoe,
    "trt_moe": trt_moe,
}

AUTO = "auto"
FORMS = (AUTO, *WRITERS)


def why_not(block: MoEBlock, form: str) -> str | None:
    """Why ``form`` cannot express ``block``; None where it can."""
    asked = getattr(WRITERS[form], "why_not", None)
    return None if asked is None else asked(block)


def choose_form(block: MoEBlock, accepted: Sequence[str]) -> str:
    """The form for ``block`` among those that a target accepts.

    1. One expert with a gate of 1: ``ffn``.
    2. As many experts as are selected, so that nothing is ranked: ``dense``.
    3. More: ``sorted`` where the target takes data-dependent shapes (measured in benchmarks/forms.md), else ``dense``.
    """
    if "ffn" in accepted and ffn.why_not(block) is None:
        return "ffn"
    ranked = block.num_experts > block.router.top_k
    return next(form for form in (("sorted", "dense", "gather") if ranked else ("dense", "gather")) if form in accepted)
