"""The oracle of pruning: the unpruned model with the dropped experts made unselectable, silent or constant."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from models.families import family_of
from models.moe_layers import find_moe_layers
from moe_spec.layer_plan import REPLACE, ROWS, UNTOUCHED, LayerPlan
from moe_spec.plan import PruningPlan

UNSELECTABLE = -1e30
"""For a selection bias. Finite: in the sum of a group's two best, two dropped experts must not turn into NaN, and they
must still rank above the experts of groups that were not selected."""


def plan_for(
    model: PreTrainedModel, keeps: Mapping[str, tuple[int, ...]], top_k: int | None = None, router: str = ROWS
) -> PruningPlan:
    """A plan that keeps ``keeps[layer]`` in the layers named; ``top_k`` None leaves K as it is."""
    layers = [
        LayerPlan(
            layer.name,
            layer.num_experts,
            top_k or layer.top_k,
            tuple(keeps[layer.name]),
            groups=layer.groups,
            router=router,
        )
        for layer in find_moe_layers(model)
        if layer.name in keeps
    ]
    return PruningPlan(model_sha256="", criterion="by hand", layers=tuple(layers))


SELECTION_BIASES = ("e_score_correction_bias", "expert_bias")
"""How the names of tensors end that are added to scores for the choice of experts only."""


def with_any_means(plan: LayerPlan, hidden: int) -> LayerPlan:
    """``plan`` with mean outputs for the experts that it drops, in a model of width ``hidden``."""
    means_DH = np.random.default_rng(len(plan.dropped)).standard_normal((len(plan.dropped), hidden))
    return dataclasses.replace(plan, router=REPLACE, means_DH=means_DH.astype(np.float32))


@contextlib.contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[None]:
    """Within the block the experts that ``plan`` drops have router logits of -inf, before softmax and top-k.

    Where the router stays as it is it chooses as ever, and the weights of those that it should not have chosen are 0,
    or multiply their mean outputs.
    """
    masks = {}
    with contextlib.ExitStack() as stack:
        for layer in find_moe_layers(model):
            layer_plan = plan.layer(layer.name)
            if layer_plan is None:
                continue
            if layer_plan.router in UNTOUCHED:
                stack.enter_context(_without_gates(layer.experts, layer_plan))
                continue
            mask_E = torch.zeros(layer.num_experts)
            mask_E[list(layer_plan.dropped)] = -torch.inf
            block = model.get_submodule(layer.name).state_dict(keep_vars=True)
            weight, *others = family_of(model.config).routing_tensors
            masks[_address(block[weight])] = mask_E
            for name in others:
                if name.endswith(SELECTION_BIASES):
                    stack.enter_context(_unselectable(block[name].data, list(layer_plan.dropped)))
        stack.enter_context(_MaskedLinear(masks))
        yield


@contextlib.contextmanager
def _without_gates(experts: nn.Module, plan: LayerPlan) -> Iterator[None]:
    chosen: list[tuple[Tensor, Tensor]] = []

    def silence(_: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, ids, weights = args
        chosen.append((ids, weights))
        return hidden, ids, weights.masked_fill(torch.isin(ids, torch.tensor(plan.dropped)), 0)

    def replace(_: nn.Module, _args: object, out: Tensor) -> Tensor:
        ids, weights = chosen.pop()
        for expert, mean in zip(plan.dropped, () if plan.means_DH is None else plan.means_DH, strict=False):
            out = out + (weights * (ids == expert)).sum(dim=1)[:, None] * torch.from_numpy(mean)
        return out

    handles = experts.register_forward_pre_hook(silence), experts.register_forward_hook(replace)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _MaskedLinear(TorchFunctionMode):
    """Adds a mask to what ``F.linear`` gives for some weights."""

    def __init__(self, masks: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._masks = masks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and _address(args[1]) in self._masks:
            return result + self._masks[_address(args[1])]
        return result


def _address(weight: Any) -> int:
    """The same for a weight and for its casts to its own dtype."""
    return int(weight.data_ptr())


@contextlib.contextmanager
def _unselectable(bias: Tensor, dropped: list[int]) -> Iterator[None]:
    """``bias`` is (E,) or (1, E)."""
    before = bias.clone()
    bias[..., dropped] = UNSELECTABLE
    try:
        yield
    finally:
        bias.copy_(before)
