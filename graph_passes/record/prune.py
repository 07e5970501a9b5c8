"""Pruning on the record: one keep list in, a narrower record out. Nothing is read, nothing in the graph changes."""

import dataclasses
from collections.abc import Sequence

from graph_passes.record.block import ON_INPUT, Constants, MoEBlock, Router
from graph_passes.record.merge import merge_block
from graph_passes.record.share import share_experts
from graph_passes.weights.weight import Weight, from_array
from moe_spec.errors import UserError
from moe_spec.layer_plan import ALIAS, NEW, REPLACE, UNTOUCHED, LayerPlan
from moe_spec.plan import PruningPlan


def prune_block(block: MoEBlock, plan: LayerPlan) -> MoEBlock:
    """``block`` with the experts ``plan.keep`` only.

    Router rows, router bias, selection bias, expert weights and expert biases are sliced with one keep list. Experts
    stay in the routing group they were in. Removing a row equals setting its logit to -inf before softmax and top-k.

    Where the plan keeps the router full no row goes, for each has a share in the softmax and a place in the top-k: they
    lead to no expert any more (https://arxiv.org/abs/2405.16646, token-choice routing), but to a constant
    where the plan replaces experts by their mean outputs (https://arxiv.org/abs/2507.00390).

    Where the plan merges, survivors are weighted means, computed when they are written (`graph_passes.record.merge`).

    Raises:
        UserError: the plan is for a layer with other counts, removes rows of a router of which some lead nowhere,
            replaces experts whose weights multiply what they read, or merges quantised ones.
    """
    require_rows(block, plan)
    if plan.router == ALIAS:
        return share_experts(block, plan)
    if plan.router in UNTOUCHED:
        return _prune_behind(block, plan)
    router = block.router
    if (plan.experts, plan.groups) != (block.num_experts, router.groups):
        raise UserError(
            f"the plan says that layer {plan.name} has {plan.experts} experts and {_groups(plan.groups)}, "
            f"the graph has {block.num_experts} and {_groups(router.groups)}",
            hint="make a plan for this model with `moe-edge plan`",
        )
    if plan.top_k != min(router.top_k, len(plan.keep)):
        raise UserError(
            f"the plan sets K={plan.top_k} in layer {plan.name}, whose router selects K={router.top_k}",
            hint=f"K shrinks only where fewer experts are kept; here it is {min(router.top_k, len(plan.keep))}",
        )
    block = merge_block(block, plan)
    return dataclasses.replace(
        block,
        router=_prune_router(block.router, plan),
        experts=block.experts.take(plan.keep),
        keep=tuple(block.keep[expert] for expert in plan.keep),
    )


def require_rows(block: MoEBlock, plan: LayerPlan) -> None:
    """Refuse to remove rows of a router that has more of them than experts.

    Raises:
        UserError: with the layer.
    """
    if block.router.leads_to is not None and plan.router not in UNTOUCHED:
        raise UserError(
            f"the plan removes rows of the router of layer {block.name}, of which only "
            f"{len(block.router.leads_to)} of {block.router.weight_EH.shape[0]} lead to an expert",
            hint="make the plan with `moe-edge plan --router full`, or leave this layer out of it",
        )


def _prune_behind(block: MoEBlock, plan: LayerPlan) -> MoEBlock:
    """``block`` with the experts ``plan.keep`` behind the router as it is."""
    router = block.router
    if (plan.experts, plan.top_k) != (block.num_experts, router.top_k):
        raise UserError(
            f"the plan says that layer {plan.name} has {plan.experts} experts and K={plan.top_k}, "
            f"the graph has {block.num_experts} and K={router.top_k}",
            hint="make a plan for this model with `moe-edge plan`; a full router selects as many as ever",
        )
    leads_to = tuple(block.row_of[expert] for expert in plan.keep)
    if router.leads_to is not None and not set(leads_to) <= set(router.leads_to):
        raise UserError(
            f"the plan keeps experts {list(plan.keep)} of layer {block.name}, whose router drops the gates of all but "
            f"{list(router.leads_to)}",
            hint="leave this layer out of the plan",
        )
    if len(leads_to) == router.weight_EH.shape[0]:
        return block
    aliases = tuple((row, other) for row, other in router.aliases if other in leads_to)
    return dataclasses.replace(
        block,
        router=dataclasses.replace(router, leads_to=leads_to, gathered=True, aliases=aliases),
        experts=block.experts.take(plan.keep),
        keep=tuple(block.keep[expert] for expert in plan.keep),
        constants=constants_for(block, plan) if plan.router == REPLACE else None,
    )


def constants_for(block: MoEBlock, plan: LayerPlan) -> Constants:
    """What stands in for the experts of ``block`` that ``plan`` replaces; not for those whose gates the graph drops.

    Raises:
        UserError: the plan's mean outputs are not at hand or of another width, or the weights of ``block`` multiply
            what its experts read.
    """
    if block.weights_on == ON_INPUT:
        raise UserError(
            f"the router of layer {block.name} weighs what experts read, so that none can be replaced by a constant "
            "times its gate",
            hint="plan with --router full or rows",
        )
    experts, leads_to = block.experts, block.router.leads_to
    means_DH = plan.mean_outputs(experts.down_EFH.shape[2]).astype(experts.up_EHF.float_dtype)
    index_of = {block.row_of[expert]: index for index, expert in enumerate(plan.dropped)}
    index_of.update({row: index_of[other] for row, other in block.router.aliases if other in index_of})
    rows = tuple(row for row in index_of if leads_to is None or row in leads_to or row in dict(block.router.aliases))
    return Constants(rows, from_array(means_DH[[index_of[row] for row in rows]]))


def _prune_router(router: Router, plan: LayerPlan) -> Router:
    return dataclasses.replace(
        router,
        weight_EH=router.weight_EH.take(plan.keep),
        bias_E=_take(router.bias_E, plan.keep),
        selection_bias_E=_take(router.selection_bias_E, plan.keep),
        scale_E=_take(router.scale_E, plan.keep),
        top_k=plan.top_k,
        group_of=tuple(router.group_of[expert] for expert in plan.keep) if router.groups else (),
    )


def _take(weight: Weight | None, keep: Sequence[int]) -> Weight | None:
    return None if weight is None else weight.take(keep)


def _groups(groups: object) -> str:
    return "no routing groups" if groups is None else f"{groups}"


def match_layers(plan: PruningPlan | None, blocks: Sequence[MoEBlock]) -> list[LayerPlan | None]:
    """For each block what the plan says of it; nothing of any without a plan.

    Blocks are found by name; by the end of the name where an exporter put something in front; and in order where the
    graph has lost all names and the counts agree.

    Raises:
        UserError: the plan names a layer that the graph lacks, or draws a router anew.
    """
    if plan is None:
        return [None] * len(blocks)
    drawn = [layer.name for layer in plan.layers if layer.router == NEW]
    if drawn:
        raise UserError(
            f"the plan draws the router of layer {drawn[0]} anew, and a graph does not say how a new model's is drawn",
            hint="export the checkpoint with the plan: moe-edge export CHECKPOINT --plan plan.json -o exported/; or "
            "plan with --router mean",
        )
    if len(plan.layers) == len(blocks) and all(block.name == f"moe.{index}" for index, block in enumerate(blocks)):
        return list(plan.layers)
    matched = [next((layer for layer in plan.layers if _same(layer.name, block.name)), None) for block in blocks]
    names = {layer.name for layer in matched if layer is not None}
    unknown = [layer.name for layer in plan.layers if layer.name not in names]
    if unknown:
        raise UserError(
            f"the plan names layer {unknown[0]!r}, which the model lacks",
            hint=f"the model's MoE layers are: {', '.join(block.name for block in blocks)}",
        )
    return matched


def _same(planned: str, found: str) -> bool:
    """Whether two paths name the same block.

    >>> _same("model.layers.0.mlp", "wrapper.model.layers.0.mlp"), _same("layers.1", "layers.11")
    (True, False)
    """
    return found == planned or found.endswith(f".{planned}") or planned.endswith(f".{found}")
