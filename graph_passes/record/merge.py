"""Merging on the record: the weights of each survivor become the weighted mean of its group when they are read.

The arithmetic is that of checkpoints (`moe_spec.merging`), on the same numbers: a graph that is merged has the bytes of
one that was exported with the plan.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from graph_passes.record.block import Experts, MoEBlock, Router
from graph_passes.weights.weight import Array, Rows, Weight, from_array
from moe_spec.errors import UserError
from moe_spec.layer_plan import MEAN, LayerPlan, Merge
from moe_spec.merging import Merging, weighted_mean

AXIS_OF_NEURONS = {"gate_EHF": 1, "up_EHF": 1, "gate_bias_EF": 0, "up_bias_EF": 0, "down_EFH": 0}
"""In the weights of one expert. They come in the order of a checkpoint, where gate and up are one."""

PLACES = (*AXIS_OF_NEURONS, "down_bias_EH")


def merge_block(block: MoEBlock, plan: LayerPlan) -> MoEBlock:
    """``block`` in which each expert of a group has the weights of that group's mean; its E stays.

    With the router ``mean``, the rows of survivors are means too. Where all experts of every group are equal, as in a
    graph that was exported with the plan, nothing is computed, and of quantised weights nothing has to be.

    Raises:
        UserError: experts that differ are quantised.
    """
    router = _with_mean_rows(block.router, plan) if plan.router == MEAN else block.router
    if _differing(block, plan) is None:
        return block if router is block.router else dataclasses.replace(block, router=router)
    merging = _merging(block, plan)
    experts = _computed(block.experts, plan, lambda name, survivor, _: merging.mean(name, survivor))
    return dataclasses.replace(block, router=router, experts=experts)


def align_block(block: MoEBlock, plan: LayerPlan) -> MoEBlock:
    """``block`` with the neurons of its experts in the order in which they are averaged: it computes what it did."""
    return dataclasses.replace(block, experts=_computed(block.experts, plan, _merging(block, plan).aligned))


def merges(block: MoEBlock, plan: LayerPlan | None) -> bool:
    """Whether ``plan`` changes weights of ``block`` or rows of its router, instead of taking some of them."""
    return plan is not None and bool(plan.merge) and (plan.router == MEAN or _differing(block, plan) is not None)


def _differing(block: MoEBlock, plan: LayerPlan) -> Merge | None:
    """The first group whose experts differ, if one has such.

    Raises:
        UserError: they are quantised.
    """
    found = next((merge for merge in plan.merge if not _are_equal(block, merge.experts)), None)
    if found is not None and any(weight.scales is not None for weight in block.experts.weights()):
        raise UserError(
            f"the plan merges experts {list(found.experts)} of layer {block.name}, whose weights are quantised: their "
            "mean would have to be rounded anew",
            hint="merge in the float model, and quantise the result: moe-edge optimize exported/ --plan plan.json "
            "--precision int8",
        )
    return found


def _are_equal(block: MoEBlock, members: Sequence[int]) -> bool:
    held = [part for weight in block.experts.weights() for part in (weight.values, weight.scales, weight.zero_points)]
    for weight in (part for part in held if part is not None and part.shape[0] == block.num_experts):
        first, *others = (weight.take([expert]) for expert in members)
        if any(not np.array_equal(first.load(), other.load()) for other in others):
            return False
    return True


def _merging(block: MoEBlock, plan: LayerPlan) -> Merging:
    held = {name: getattr(block.experts, name) for name in PLACES}
    neurons = [name for name in AXIS_OF_NEURONS if held[name] is not None]

    def read(name: str, expert: int) -> Array:
        values: Array = held[name].take([expert]).load()[0]
        return np.moveaxis(values, AXIS_OF_NEURONS[name], 0) if name in neurons else values

    return Merging(plan, neurons, read)


def _computed(experts: Experts, plan: LayerPlan, value: Callable[[str, int, int], Array]) -> Experts:
    """``experts``, of which those in groups have what ``value`` gives for a name, a survivor and one of its group."""
    changed: dict[str, Any] = {}
    for name in PLACES:
        weight: Weight | None = getattr(experts, name)
        if weight is not None:
            swapped = weight.swap() if weight.swapped else weight  # it is written as it lies
            lazy = _lazy(swapped, weight, name, plan, value)
            changed[name] = lazy.swap() if weight.swapped else lazy
    return dataclasses.replace(experts, **changed)


def _lazy(
    stored: Weight, weight: Weight, name: str, plan: LayerPlan, value: Callable[[str, int, int], Array]
) -> Weight:
    """What ``value`` gives in the axes of ``stored``, which has those of ``weight`` or the last two swapped."""
    grouped = {expert for merge in plan.merge for expert in merge.experts}

    def one(expert: int) -> Array:
        if expert not in grouped:
            (values,) = stored.take([expert]).load()
            return np.asarray(values)
        values = value(name, plan.survivor_of[expert], expert)
        values = np.moveaxis(values, 0, AXIS_OF_NEURONS[name]) if name in AXIS_OF_NEURONS else values
        return _rounded(values.T if weight.swapped else values, stored.dtype)

    def read(rows: Rows | None) -> Array:
        return np.stack([one(expert) for expert in (range(stored.shape[0]) if rows is None else rows)])

    return Weight(stored.shape, stored.dtype, read, stored.shape[0])


def _rounded(values: Array, dtype: "np.dtype[np.generic]") -> Array:
    """In ``dtype``, by way of float32 where that is narrower, which is how torch rounds float64."""
    return values.astype(np.float32).astype(dtype) if dtype.itemsize < np.float32().itemsize else values.astype(dtype)


def _with_mean_rows(router: Router, plan: LayerPlan) -> Router:
    def mean(rows: Weight) -> Weight:
        before = rows.load()
        after = np.array(before)
        for survivor, merge in zip(plan.keep, plan.merge, strict=True):
            values = weighted_mean((weight, before[row]) for weight, row in merge.weighted)
            after[survivor] = _rounded(values, rows.dtype)
        return from_array(after)

    rows = {name: getattr(router, name) for name in ("weight_EH", "bias_E", "selection_bias_E", "scale_E")}
    changed: dict[str, Any] = {name: mean(weight) for name, weight in rows.items() if weight is not None}
    return dataclasses.replace(router, **changed)
