"""Apply a merge: the weights of every survivor become the weighted mean of its group, in place."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.families import Family, family_of
from models.moe_layers import MoELayer, axis_of_experts
from moe_spec.errors import UserError
from moe_spec.plan import ALIAS, MEAN, NEW, LayerPlan, Merge
from pruning.merging.align import aligned


@torch.no_grad()
def merge_layers(
    model: PreTrainedModel, todo: Iterable[tuple[MoELayer, LayerPlan]], options: Mapping[str, Any]
) -> None:
    """Merge the experts of every layer whose plan says so; layers keep their E, and the rows of survivors change.

    What is left to do is what any plan asks for: slice router and experts by ``keep``. Means are computed in float64
    and stored in the parameter's dtype, so the mean of equal weights is equal to them.

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
            # where experts are dropped, there is no merge
            for survivor, merge in zip(plan.keep, plan.merge, strict=False):
                _merge_experts(layer.experts, survivor, merge, plan.align)
                if plan.router == ALIAS:
                    _share(layer.experts, survivor, merge)
                if plan.router == MEAN:
                    _merge_rows(model.get_submodule(layer.name), survivor, merge, row, plan.experts)
            if plan.router == NEW:
                _draw(model, layer.router, row)


def _merge_experts(experts: nn.Module, survivor: int, merge: Merge, align: bool) -> None:
    stacked = dict(experts.named_parameters(recurse=False))

    def member(expert: int) -> dict[str, Tensor]:
        weights = {name: parameter[expert] for name, parameter in stacked.items()}
        if expert == survivor or not align:
            return weights
        return aligned(experts, member(survivor), weights)

    weighted = [(weight, member(expert)) for expert, weight in zip(merge.experts, merge.weights, strict=True) if weight]
    for name, parameter in stacked.items():
        parameter[survivor] = _mean([(weight, weights[name]) for weight, weights in weighted])


def _share(experts: nn.Module, survivor: int, merge: Merge) -> None:
    for parameter in experts.parameters(recurse=False):
        parameter[list(merge.experts)] = parameter[survivor].clone()


def _merge_rows(block: nn.Module, survivor: int, merge: Merge, row: Family, experts: int) -> None:
    there = block.state_dict(keep_vars=True)
    for name in row.routing_tensors:
        tensor = there[name].transpose(0, axis_of_experts(there[name], experts))
        pairs = zip(merge.weights, merge.experts, strict=True)
        tensor[survivor] = _mean([(weight, tensor[expert]) for weight, expert in pairs])


def _mean(weighted: list[tuple[float, Tensor]]) -> Tensor:
    """Divided last: whole weights of equal float32 values then give that value exactly."""
    total = sum(weight * tensor.double() for weight, tensor in weighted)
    assert isinstance(total, Tensor), "a plan has no merge whose weights are all 0"
    return total / sum(weight for weight, _ in weighted)


def _draw(model: PreTrainedModel, router: nn.Module, row: Family) -> None:
    """Fill a router as a new model's would be: rows are drawn one like the other, so those that stay are as good."""
    for name in row.router_tensors:
        tensor = operator.attrgetter(name)(router)
        vars(tensor).pop("_is_hf_initialized", None)  # set on loaded tensors, which init leaves alone
    model._init_weights(router)  # type: ignore[no-untyped-call]
