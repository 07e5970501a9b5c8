"""What happens to each MoE block: which experts go, and which form it gets, if any.

Nothing is rewritten that nobody asked to rewrite. A block of which no expert goes stays as it stands, unless a form is
asked for by name, or a target is given that another form suits better.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import onnx_graphsurgeon as gs

from graph_passes.graph.dequantize import BLOCKED_SINCE, SINCE
from graph_passes.graph.emitter import Emitter, Names
from graph_passes.graph.opset import raise_opset
from graph_passes.graph.walk import replace_uses
from graph_passes.quantization.quantize import Quantization, is_quantized, quantized
from graph_passes.quantization.quantize import why_not as why_not_quantized
from graph_passes.record.block import MoEBlock
from graph_passes.record.prune import prune_block
from graph_passes.writers import AUTO, OF_ONE_RUNTIME, WRITERS, choose_form, why_not, write
from graph_passes.writers.routing import Routing
from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan

T = TypeVar("T")

OPSETS = range(17, 26)
"""Versions of the standard operators that every writer's ops are valid in."""

STACKED = ("dense", "gather")
"""Forms in which a scale belongs to an expert and a channel of one tensor, as only blocks can say."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What happens to one block.

    Attributes:
        read: the block as it was found.
        pruned: the same without the experts that go.
        form: the form that it gets; None where it stays as it stands.
    """

    read: MoEBlock
    pruned: MoEBlock
    form: str | None


@dataclasses.dataclass(frozen=True)
class Written:
    """One block as it stands in the new graph; ``routing`` is None where its router went or was left alone."""

    block: MoEBlock
    routing: Routing | None
    rewritten: bool


def decide(
    block: MoEBlock,
    layer: LayerPlan | None,
    form: str,
    accepted: Sequence[str] | None,
    how: Quantization | None = None,
    tokens: int | None = None,
) -> Decision:
    """What happens to ``block`` under ``layer`` (None: all experts stay), ``form`` and the forms a target accepts.

    ``how`` says how its experts are quantised; None: they stay what they are. ``tokens`` are those of a run.

    Raises:
        UserError: the plan does not fit the block, its experts cannot be quantised, or the form cannot express it.
    """
    pruned = block if layer is None else prune_block(block, layer)
    quantizes = how is not None and not is_quantized(block.experts, how)
    untouched = pruned.num_experts == block.num_experts and not quantizes
    if how is not None and quantizes:
        pruned = _quantize(pruned, how)
    if form == AUTO and accepted is None and untouched:
        return Decision(block, block, None)
    chosen = form
    if form == AUTO:
        chosen = choose_form(pruned, _forms_around(pruned) if accepted is None else accepted, tokens)
    if untouched and chosen == block.form:
        return Decision(block, block, None)
    reason = why_not(pruned, chosen)
    if reason is not None:
        raise UserError(
            f"form {chosen} cannot express layer {block.name}: {reason}", hint="use --form auto, or another form"
        )
    return Decision(block, pruned, chosen)


def _forms_around(block: MoEBlock) -> Sequence[str]:
    """The forms to choose among without a target: the one that the block has, where a writer has it too."""
    if block.form in WRITERS and why_not(block, block.form) is None:
        return (block.form, "ffn")
    return tuple(form for form in WRITERS if form not in OF_ONE_RUNTIME)


def _quantize(block: MoEBlock, how: Quantization) -> MoEBlock:
    reason = why_not_quantized(block.experts, how)
    if reason is not None:
        raise UserError(
            f"layer {block.name} cannot be quantised to {how.format}: {reason}",
            hint="leave --precision out, or choose another --block-size",
        )
    return dataclasses.replace(block, experts=quantized(block.experts, how))


def carry_out(graph: gs.Graph, decisions: Sequence[Decision]) -> list[Written]:
    """Write every block that gets another form; the nodes of the old one are dead afterwards.

    The last goes first: a block may read what another one writes.

    Raises:
        UserError: the graph is of an opset that the writers do not write, or cannot be of the one that is needed.
    """
    if any(decision.form is not None for decision in decisions):
        check_opset(graph)
        needed = max(map(_needed_opset, decisions))
        raise_opset(graph, needed, "what dequantises the experts")
    names, written = Names(graph), []
    for decision in reversed(decisions):
        if decision.form is None:
            written.append(Written(decision.read, None, rewritten=False))
            continue
        block = dataclasses.replace(decision.pruned, form=decision.form)
        out, routing = on_tokens(Emitter(graph, block.name, names), block, write)
        replace_uses(graph, block.out, out)
        written.append(Written(block, routing, rewritten=True))
    return written[::-1]


def _needed_opset(decision: Decision) -> int:
    """The opset that can say what is quantised on the way, in the form that it gets."""
    before, after = decision.read.experts.up_EHF, decision.pruned.experts.up_EHF
    if decision.form in (None, *OF_ONE_RUNTIME) or after.scales is None or before.scales is not None:
        return 0
    blocked = after.scales.shape[1] > 1 or decision.form in STACKED
    return max(SINCE[after.dtype.name], BLOCKED_SINCE if blocked else 0)


def check_opset(graph: gs.Graph) -> None:
    """Refuse a graph of an opset that the writers do not write.

    Raises:
        UserError: it is none of `OPSETS`.
    """
    if graph.opset not in OPSETS:
        raise UserError(
            f"the model is written for opset {graph.opset}, its layers can be written for {OPSETS[0]} to {OPSETS[-1]}",
            hint="convert it first: onnx.version_converter.convert_version(model, 20)",
        )


def on_tokens(
    emitter: Emitter, block: MoEBlock, emit: Callable[[Emitter, MoEBlock], tuple[gs.Tensor, T]]
) -> tuple[gs.Tensor, T]:
    """What ``emit`` gives of ``block`` on (T, H), its first result in the axes that ``block`` has in the graph."""
    if block.shaped_like is None:
        return emit(emitter, block)
    shape = emitter.emit("Shape", block.shaped_like, label="shape")
    router, width = block.router, block.experts.down_EFH.shape[2]
    hidden = emitter.reshape(block.hidden, (-1, width), "tokens")
    read = hidden if router.hidden is block.hidden else emitter.reshape(router.hidden, (-1, width), "router_tokens")
    flat = dataclasses.replace(block, hidden=hidden, router=dataclasses.replace(router, hidden=read))
    out, further = emit(emitter, flat)
    return emitter.emit("Reshape", out, shape, label="out_shaped"), further
