"""Emit one form of a ``MoEBlock``. One file a form, each with ``write(emitter, block) -> (out, routing)``.

A writer that cannot express every block has ``why_not(block) -> reason | None`` too.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType

import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import MoEBlock
from graph_passes.writers import dense, ffn, gather, moe, qmoe, sorted_runs, trt_moe
from graph_passes.writers.constants import add_constants
from graph_passes.writers.routing import Routing
from moe_spec.errors import UserError

WRITERS: Mapping[str, ModuleType] = {
    "dense": dense,
    "sorted": sorted_runs,
    "gather": gather,
    "ffn": ffn,
    "moe": moe,
    "qmoe": qmoe,
    "trt_moe": trt_moe,
}

PREFERENCES: Mapping[str, Sequence[str]] = {
    "quantised": ("qmoe", "ffn", "sorted", "dense"),
    "all selected": ("ffn", "dense", "sorted", "gather"),
    "some selected": ("sorted", "dense", "gather"),
    "one token": ("moe", "sorted", "dense", "gather"),
}
"""What ``auto`` tries, by how the block is used. Only the CPU takes ``sorted`` and ``moe``; TensorRT gets ``dense``."""

OF_ONE_RUNTIME = ("moe", "qmoe", "trt_moe")
"""Forms of ops that are not in the ONNX standard: a file gets them where a target is named that has them."""

BEHIND_A_FULL_ROUTER = ("dense", "sorted", "gather")
"""Forms that can have fewer experts than the router has rows."""

AUTO = "auto"
FORMS = (AUTO, *WRITERS)


def write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, Routing | None]:
    """Nodes that compute ``block.out`` in the form that ``block`` says, and the routing they use."""
    out: gs.Tensor
    routing: Routing | None
    out, routing = WRITERS[block.form].write(emitter, block)
    if block.constants is None:
        return out, routing
    assert routing is not None, "a router that stays as it is, is written"
    return add_constants(emitter, block, block.constants, routing, out), routing


def why_not(block: MoEBlock, form: str) -> str | None:
    """Why ``form`` cannot express ``block``; None where it can."""
    if block.router.leads_to is not None and form not in BEHIND_A_FULL_ROUTER:
        return "some rows of its router lead to no expert of their own"
    asked = getattr(WRITERS[form], "why_not", None)
    return None if asked is None else asked(block)


def choose_form(block: MoEBlock, accepted: Sequence[str], tokens: int | None = None) -> str:
    """The form for ``block`` among those that a target accepts; ``tokens`` are those of a run, where they are known.

    The first that can express the block, of the list that ``PREFERENCES`` has for its case (measured in
    benchmarks/forms.md), then of whatever else the target accepts.

    Raises:
        UserError: none of them can.
    """
    preferred = [form for form in PREFERENCES[_case(block, tokens)] if form in accepted]
    found = next((form for form in (*preferred, *accepted) if why_not(block, form) is None), None)
    if found is None:
        tried = [f"{form}: {why_not(block, form)}" for form in accepted]
        raise UserError(
            f"no form that the target takes can express layer {block.name} ({'; '.join(tried)})",
            hint="choose another --target, or a --form",
        )
    return found


def _case(block: MoEBlock, tokens: int | None) -> str:
    if any(weight.scales is not None for weight in block.experts.weights()):
        return "quantised"
    if block.num_experts <= block.router.top_k:
        return "all selected"
    return "one token" if tokens == 1 else "some selected"
