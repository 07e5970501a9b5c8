"""Apply: a plan turns a model in memory into a smaller one."""

import torch
from torch import nn
from transformers import PreTrainedModel

from models.families import GROUP_COUNTS, Family, family_of
from models.moe_layers import MoELayer, axis_of_experts, find_moe_layers, require_gated_outputs, set_top_k
from moe_spec.errors import UserError, did_you_mean
from moe_spec.feasibility import Groups, check_expert_choice, check_keep
from moe_spec.layer_plan import ALIAS, NEW, REPLACE, UNTOUCHED, LayerPlan
from moe_spec.plan import PruningPlan
from pruning.behind_router import is_led, lead_to
from pruning.merging.apply import merge_layers

ONNX_WAY = "prune the ONNX graph, which has no such limit: moe-edge optimize exported/ --plan plan.json"
MERGE_WAY = "merge into as many experts in every layer and every group: moe-edge plan --scope layer, and more --keep"


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Drop experts in memory: ``w (E, ...) -> w[keep] (Ek, ...)`` for router and experts of every layer named.

    1. Survivor ``j`` is expert ``keep[j]`` of before, so a top-k that goes by id, as ONNX does, breaks ties as before.
    2. Router weight, bias and selection bias are sliced by the same ids; shared experts and scales stay untouched.
    3. Layers may keep different numbers. The config has one count: it changes only where all layers agree.
    4. All layers are checked before the first is changed.
    5. Where the router stays as it is, experts go and no row does: those of dropped experts lead to none, or to their
       mean output. That can be measured and exported; a checkpoint cannot say it.
    6. Where a plan merges experts, the survivors become weighted means first (``pruning.merging.apply``). Where rows of
       the router share them, each of the group becomes the mean, and an ONNX graph makes one of these equals.

    Raises:
        UserError: a layer that the model lacks or has with another number of experts, or one whose router cannot
            work with what is kept.
    """
    row = family_of(model.config)
    layers = {layer.name: layer for layer in find_moe_layers(model)}
    todo = [(_find(layers, layer_plan), layer_plan) for layer_plan in plan.layers]
    for layer, _ in todo:
        _require_tensors(model, layer, row)
    groups = [_groups_after(layer, layer_plan) for layer, layer_plan in todo]
    merge_layers(model, todo, plan.options)
    for (layer, layer_plan), left in zip(todo, groups, strict=True):
        if layer_plan.router not in UNTOUCHED:
            _slice_experts(layer, layer_plan, row)
            _slice_router(model.get_submodule(layer.name), layer_plan, row)
            _set_counts(model, layer, layer_plan, left, row)
        elif layer_plan.router != ALIAS and layer_plan.dropped:
            _slice_experts(layer, layer_plan, row)
            lead_to(layer, layer_plan)
    shapes = distinct_shapes(model)
    untouched = any(layer_plan.router in UNTOUCHED for layer_plan in plan.layers)
    if len(shapes) == 1 and not untouched and not row.attention_experts:
        experts, top_k, one_group = shapes.pop()
        row.set_config_counts(model.config, experts, top_k, one_group)
        for name, value in (("num_experts", experts), ("num_experts_per_tok", top_k)):
            if hasattr(model, name):  # what the auxiliary loss of transformers' decoders reads
                setattr(model, name, value)


def _find(layers: dict[str, MoELayer], plan: LayerPlan) -> MoELayer:
    if plan.name not in layers:
        raise UserError(
            f"the plan names layer {plan.name!r}, which the model does not have", hint=did_you_mean(plan.name, layers)
        )
    layer = layers[plan.name]
    if plan.router == REPLACE:
        require_gated_outputs(layer, "no mean output takes an expert's place")
        plan.mean_outputs(layer.hidden_size)
    fits = plan.top_k == layer.top_k if plan.router in UNTOUCHED else plan.top_k <= layer.top_k
    if plan.experts != layer.num_experts or not fits:
        raise UserError(
            f"the plan is for {plan.experts} experts in layer {plan.name} and leaves K={plan.top_k}, "
            f"but the model has {layer.num_experts} there, and K={layer.top_k}",
            hint="make a plan for this model with `moe-edge plan`",
        )
    return layer


def _groups_after(layer: MoELayer, plan: LayerPlan) -> Groups | None:
    """What a torch router of groups of equal length needs to route as before; emptied groups vanish."""
    if layer.expert_choice:
        check_expert_choice(layer.name, len(plan.keep), full=plan.router in UNTOUCHED)
    if plan.router in UNTOUCHED:
        return layer.groups
    check_keep(layer.name, layer.num_experts, plan.top_k, plan.keep, layer.groups)
    if layer.groups is None:
        return None
    survivors = layer.groups.survivors(plan.keep, layer.num_experts)
    filled = [count for count in survivors if count > 0]
    if min(filled) < layer.groups.scored_by or len(set(filled)) > 1:
        raise UserError(
            f"layer {layer.name} keeps {survivors} experts in its {layer.groups.count} routing groups, but a torch "
            f"router needs the same number in each, at least {layer.groups.scored_by}",
            hint=MERGE_WAY if plan.router == NEW else ONNX_WAY,
        )
    return Groups(len(filled), min(layer.groups.selected, len(filled)), layer.groups.scored_by)


def _require_tensors(model: PreTrainedModel, layer: MoELayer, row: Family) -> None:
    there = model.get_submodule(layer.name).state_dict()
    missing = [name for name in row.routing_tensors if name not in there]
    if missing:  # DeepSeek-V4's first layers choose experts by token id
        raise UserError(
            f"the {type(layer.router).__name__} of layer {layer.name} has no {missing[0]!r}, so it does not choose "
            f"experts as {row.model_type} does elsewhere",
            hint="leave the layer out of the plan; fine-tune with --method plain or router-kd",
        )
    if is_led(layer):
        rows = len(there[row.routing_tensors[0]])
        raise UserError(
            f"the router of layer {layer.name} has {rows} rows and leads to {layer.num_experts} experts: a plan that "
            "keeps it full was applied before",
            hint="apply one plan to the model as it was loaded",
        )


def _slice_experts(layer: MoELayer, plan: LayerPlan, row: Family) -> None:
    for name, _ in list(layer.experts.named_parameters(recurse=False)):
        slice_rows(layer.experts, name, plan.keep, layer.num_experts)
    setattr(layer.experts, row.experts_count, len(plan.keep))


def _slice_router(block: nn.Module, plan: LayerPlan, row: Family) -> None:
    for name in row.routing_tensors:
        slice_rows(block, name, plan.keep, plan.experts)


def slice_rows(module: nn.Module, name: str, keep: tuple[int, ...], experts: int) -> None:
    """Let the parameter or buffer ``name``, (E, ...) or (1, E), at or below ``module`` have the rows ``keep`` only."""
    owner, _, attribute = name.rpartition(".")
    holder = module.get_submodule(owner)
    tensor: torch.Tensor = getattr(holder, attribute)
    rows = torch.tensor(keep, device=tensor.device)
    kept = tensor.detach().index_select(axis_of_experts(tensor, experts), rows)
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(holder, attribute, nn.Parameter(kept, requires_grad=tensor.requires_grad) if is_parameter else kept)


def _set_counts(model: PreTrainedModel, layer: MoELayer, plan: LayerPlan, groups: Groups | None, row: Family) -> None:
    if hasattr(layer.router, row.experts_count):
        setattr(layer.router, row.experts_count, len(plan.keep))
    set_top_k(model, layer, plan.top_k)
    if groups is not None:
        for name, value in zip(GROUP_COUNTS, (groups.count, groups.selected), strict=True):
            setattr(layer.router, name, value)


def distinct_shapes(model: PreTrainedModel) -> set[tuple[int, int, Groups | None]]:
    """E, K and groups of the layers of ``model``; one where all layers agree, as a config wants it."""
    return {(layer.num_experts, layer.top_k, layer.groups) for layer in find_moe_layers(model)}
