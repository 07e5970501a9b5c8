"""Rows of a router that share an expert: merged experts whose router stays as it is, as M-SMoE and HC-SMoE leave it.

A graph has no mean of experts. Where it was exported with the plan, all experts of a group have the weights of that
mean already: the survivor stays, and all rows of the group lead to it. So the reference is the graph as it was.
"""

import dataclasses

import numpy as np

from graph_passes.block import ON_INPUT, MoEBlock
from moe_spec.errors import UserError
from moe_spec.plan import LayerPlan, Merge


def share_experts(block: MoEBlock, plan: LayerPlan) -> MoEBlock:
    """``block`` with one expert for every group of equals that ``plan`` names.

    Raises:
        UserError: the plan is for a layer with other counts, or experts of a group differ.
    """
    router = block.router
    if (plan.experts, plan.top_k) != (block.num_experts, router.top_k) or router.leads_to is not None:
        raise UserError(
            f"the plan says that layer {plan.name} has {plan.experts} experts, K={plan.top_k} and as many rows, "
            f"the graph has {block.num_experts}, K={router.top_k} and {router.weight_EH.shape[0]} rows",
            hint="make a plan for this model with `moe-edge plan`",
        )
    if block.weights_on == ON_INPUT and router.top_k > 1:
        raise UserError(
            f"the router of layer {block.name} weighs what experts read, so that the gates of two rows that share one "
            "do not add up",
            hint="plan with --router mean",
        )
    for merge in plan.merge:
        _require_equal(block, merge)
    groups = zip(plan.keep, plan.merge, strict=True)
    aliases = tuple((row, own) for own, merge in groups for row in merge.experts if row != own)
    if not aliases:
        return block
    return dataclasses.replace(
        block,
        router=dataclasses.replace(router, leads_to=plan.keep, gathered=True, aliases=aliases),
        experts=block.experts.take(plan.keep),
        keep=tuple(block.keep[expert] for expert in plan.keep),
    )


def _require_equal(block: MoEBlock, merge: Merge) -> None:
    held = [part for weight in block.experts.weights() for part in (weight.values, weight.scales, weight.zero_points)]
    for weight in (part for part in held if part is not None and part.shape[0] == block.num_experts):
        first, *others = (weight.take([expert]) for expert in merge.experts)
        if any(not np.array_equal(first.load(), other.load()) for other in others):
            raise UserError(
                f"the plan merges experts {list(merge.experts)} of layer {block.name}, which differ in this graph",
                hint="export the checkpoint with the plan: moe-edge export CHECKPOINT --plan plan.json -o exported/",
            )
