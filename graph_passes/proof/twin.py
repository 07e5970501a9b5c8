"""Twins: a model some of whose layers are written anew in one plain form, for the proof to compare with.

A graph has no mean of experts, so the reference of a plan that merges cannot be the original with something masked. It
is made in two steps. In the first, the experts of a group only get their neurons in the order in which they are
averaged: that twin has to compute what the original computes, which says that reading, order and writing are right. In
the second, every expert of a group has the weights of the mean, and the router all of its rows. From there on the proof
is that of any plan: rows are masked, or share what are equals by then.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from graph_passes.graph.order import tidy
from graph_passes.model_file import load_graph, save_graph
from graph_passes.quantization.quantize import Quantization
from graph_passes.quantization.rest import round_rest
from graph_passes.readers import read_blocks
from graph_passes.record.block import MoEBlock
from graph_passes.record.merge import align_block, merge_block, merges
from graph_passes.rewrite import Decision, carry_out
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL

TWIN = "sorted"
"""The form: it expresses every block, and is none that our exporter writes."""

Change = Callable[[MoEBlock, LayerPlan | None], MoEBlock | None]
"""What becomes of a block; None: it stays as it stands."""


def save_twin(
    source: Path, layers: Sequence[LayerPlan | None], change: Change, target: Path, rest: Quantization | None = None
) -> Path:
    """Write the ONNX file ``source`` to the new directory ``target``, its blocks changed; the new file.

    ``layers`` says for each block what a plan does to it, ``rest`` how what lies around the blocks is rounded.
    """
    target.mkdir()
    graph = load_graph(source)
    decisions, blocks = [], read_blocks(graph, source.parent).blocks
    if rest is not None:
        round_rest(graph, source.parent, blocks, rest)
    for block, layer in zip(blocks, layers, strict=True):
        changed = change(block, layer)
        decisions.append(Decision(block, block if changed is None else changed, None if changed is None else TWIN))
    carry_out(graph, decisions)
    tidy(graph)
    save_graph(graph, source.parent, target / MODEL)
    return target / MODEL


def aligned(block: MoEBlock, layer: LayerPlan | None) -> MoEBlock | None:
    """A block that is merged, before its experts are averaged: it computes what it did."""
    return align_block(block, layer) if layer is not None and merges(block, layer) else None


def merged(block: MoEBlock, layer: LayerPlan | None) -> MoEBlock | None:
    """A block that is merged, with the mean in the place of each expert of a group."""
    return merge_block(block, layer) if layer is not None and merges(block, layer) else None
