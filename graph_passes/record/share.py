"""Rows of a router that share an expert: merged experts whose router stays as it is, as M-SMoE and HC-SMoE leave it.

The survivor of a group gets the weights of its mean, where it does not have them since the graph was exported with the
plan, and all rows of the group lead to it.
"""

import dataclasses

from graph_passes.record.block import ON_INPUT, MoEBlock
from graph_passes.record.merge import merge_block
from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan


def share_experts(block: MoEBlock, plan: LayerPlan) -> MoEBlock:
    """``block`` with one expert for every group that ``plan`` names.

    Raises:
        UserError: the plan is for a layer with other counts, gates do not add up, or experts that differ are quantised.
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
    block = merge_block(block, plan)
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
