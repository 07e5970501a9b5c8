"""Apply a merge: the weights of every survivor become the weighted mean of its group, in place."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from models.families import Family, family_of
from models.merged_experts import MergedExperts
from models.moe_layers import MoELayer, axis_of_experts
from moe_spec.errors import UserError
from moe_spec.layer_plan import ALIAS, MEAN, NEW, LayerPlan
from moe_spec.merging import weighted_mean


@torch.no_grad()
def merge_layers(
    model: PreTrainedModel, todo: Iterable[tuple[MoELayer, LayerPlan]], options: Mapping[str, Any]
) -> None:
    """Merge the experts of every layer whose plan says so; layers keep their E, and the rows of survivors change.

    What is left to do is what any plan asks for: slice router and experts by ``keep``. Means are computed in float64
    and stored in the parameter's dtype, so the mean of equal weights is equal to them. What has no values, on the meta
    device, stays as it is.

    Args:
        model: whose layers they are.
        todo: layers and their plans.
        options: those of the plan; ``seed`` (0 by default) is that of routers that are drawn anew.

    Raises:
        UserError: a seed that is none.
    """
    seed = options.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise UserError(
            f"the plan's seed is {seed!r}, expected an int from 0", hint="make it again with `moe-edge plan`"
        )
    row = family_of(model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer, plan in todo:
            _merge_experts(layer.experts, plan)
            if plan.router == MEAN:
                _merge_rows(model.get_submodule(layer.name), plan, row)
            if plan.router == NEW:
                _draw(model, layer.router, row)


def _merge_experts(experts: nn.Module, plan: LayerPlan) -> None:
    stacked = dict(experts.named_parameters(recurse=False))
    if not plan.merge or any(parameter.is_meta for parameter in stacked.values()):
        return
    merged = MergedExperts(experts, plan, lambda name, expert: stacked[name][expert])
    for survivor, merge in zip(plan.keep, plan.merge, strict=True):
        members = list(merge.experts) if plan.router == ALIAS else [survivor]
        means = {name: merged.parameter(name, survivor) for name in stacked}  # before any of them is written
        for name, mean in means.items():
            stacked[name][members] = mean.to(stacked[name])


def _merge_rows(block: nn.Module, plan: LayerPlan, row: Family) -> None:
    there = block.state_dict(keep_vars=True)
    for name in row.routing_tensors:
        tensor = there[name].transpose(0, axis_of_experts(there[name], plan.experts))
        if tensor.is_meta:
            continue
        for survivor, merge in zip(plan.keep, plan.merge, strict=True):
            mean = weighted_mean((weight, tensor[expert].double().cpu().numpy()) for weight, expert in merge.weighted)
            tensor[survivor] = torch.from_numpy(mean).to(tensor)


def _draw(model: PreTrainedModel, router: nn.Module, row: Family) -> None:
    """Fill a router as a new model's would be: rows are drawn one like the other, so those that stay are as good.

    The innermost model that holds it draws: the config of one of several parts (ERNIE 4.5 VL) need not say how.
    """
    for name in row.router_tensors:
        tensor = operator.attrgetter(name)(router)
        vars(tensor).pop("_is_hf_initialized", None)  # set on loaded tensors, which init leaves alone
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    *_, innermost = (module for module in models if any(part is router for part in module.modules()))
    innermost._init_weights(router)  # type: ignore[no-untyped-call]
