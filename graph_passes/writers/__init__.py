"""Emit one form of a ``MoEBlock``. One file a form, each with ``write(emitter, block) -> (out, routing)``."""

from collections.abc import Callable, Mapping, Sequence

import onnx_graphsurgeon as gs

from graph_passes.block import MoEBlock
from graph_passes.emitter import Emitter
from graph_passes.walk import replace_uses
from graph_passes.writers import dense, ffn, gather, sorted_runs
from graph_passes.writers.routing import Routing
from moe_spec.errors import UserError

Writer = Callable[[Emitter, MoEBlock], tuple[gs.Tensor, Routing | None]]

WRITERS: Mapping[str, Writer] = {
    "dense": dense.write,
    "sorted": sorted_runs.write,
    "gather": gather.write,
    "ffn": ffn.write,
}

AUTO = "auto"
FORMS = (AUTO, *WRITERS)


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


def write_block(graph: gs.Graph, block: MoEBlock, form: str) -> Routing | None:
    """Replace ``block`` in ``graph`` by ``form``; the nodes of the old form are dead afterwards.

    Raises:
        UserError: the form cannot express the block.
    """
    reason = ffn.why_not(block) if form == "ffn" else None
    if reason is not None:
        raise UserError(
            f"form ffn cannot express layer {block.name}: {reason}", hint="use --form auto, or keep one expert"
        )
    out, routing = WRITERS[form](Emitter(graph, block.name), block)
    replace_uses(graph, block.out, out)
    return routing
