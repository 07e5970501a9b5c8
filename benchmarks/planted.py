"""Faults as people make them, planted in one MoE layer of an ONNX model: what `moe-edge verify` must catch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from graph_passes.describe import read_model
from graph_passes.graph.order import tidy
from graph_passes.model_file import save_graph
from graph_passes.record.block import MoEBlock
from graph_passes.rewrite import Decision, carry_out
from graph_passes.weights.weight import Weight, from_array
from moe_spec.companions import copy_companions
from moe_spec.manifest import MODEL

Change = Callable[[MoEBlock], MoEBlock]


def swap_experts(block: MoEBlock) -> MoEBlock:
    """Experts 1 and 2 have each other's weights, and their own router rows."""
    return dataclasses.replace(block, experts=block.experts.take(_order(block, {1: 2, 2: 1})))


def shift_router(block: MoEBlock) -> MoEBlock:
    """Every expert has the router row of the one before it."""
    return _with_rows(block, np.roll(range(block.num_experts), 1).tolist())


def repeat_row(block: MoEBlock) -> MoEBlock:
    """Expert 3 has the router row of expert 2."""
    return _with_rows(block, _order(block, {3: 2}))


def scale_twice(block: MoEBlock) -> MoEBlock:
    """What the weights are scaled with is applied twice; where that is 1, a 2 is."""
    scale = block.router.scale
    return _with_router(block, scale=2.0 if scale == 1 else scale * scale)


def forget_renormalisation(block: MoEBlock) -> MoEBlock:
    """The weights of a token add up to 1, or should not but do."""
    return _with_router(block, renormalize=not block.router.renormalize)


def zero_expert(block: MoEBlock) -> MoEBlock:
    """Expert 5 gives zeros."""
    experts, bias_EH = block.experts, block.experts.down_bias_EH
    zeroed = dataclasses.replace(
        experts,
        down_EFH=_without(experts.down_EFH, 5),
        down_bias_EH=None if bias_EH is None else _without(bias_EH, 5),
    )
    return dataclasses.replace(block, experts=zeroed)


FAULTS: Mapping[str, Change] = {
    "two experts swapped": swap_experts,
    "router rows off by one": shift_router,
    "one router row of another expert": repeat_row,
    "a scale applied twice": scale_twice,
    "a renormalisation missing": forget_renormalisation,
    "an expert zeroed": zero_expert,
}
"""By what people would call them."""


def plant(source: Path, out: Path, change: Change, layer: int, form: str = "sorted") -> Path:
    """Write ``source`` to the new directory ``out`` with ``change`` made to its MoE layer number ``layer``; the file.

    All layers are written in ``form``, by the writers that `optimize` has; nothing is proven, of course.
    """
    model = read_model(source)
    blocks = [change(block) if index == layer else block for index, block in enumerate(model.blocks)]
    out.mkdir(parents=True)
    carry_out(model.graph, [Decision(block, block, form) for block in blocks])
    tidy(model.graph)
    save_graph(model.graph, model.path.parent, out / MODEL)
    copy_companions(model.path.parent, out)
    return out / MODEL


def _without(weight: Weight, expert: int) -> Weight:
    values = weight.load().copy()
    values[expert] = 0
    return from_array(values)


def _order(block: MoEBlock, taken: Mapping[int, int]) -> Sequence[int]:
    return [taken.get(expert, expert) for expert in range(block.num_experts)]


def _with_rows(block: MoEBlock, rows: Sequence[int]) -> MoEBlock:
    return _with_router(block, weight_EH=block.router.weight_EH.take(rows))


def _with_router(block: MoEBlock, **changed: object) -> MoEBlock:
    return dataclasses.replace(block, router=dataclasses.replace(block.router, **changed))  # type: ignore[arg-type]
