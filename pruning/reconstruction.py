"""NAEE: keep the experts without which a layer's output changes least, found by search.

Expert pruning of "Not All Experts are Equal", https://arxiv.org/abs/2402.14800: for every subset of r experts the
others are made unselectable, and the subset with the smallest Frobenius norm of the output's change stays. Each layer
is searched on what the whole model feeds it (the paper's layer-wise search; not its progressive one). There are
E over r subsets; above `MAX_SUBSETS` experts are removed one after the other, each time the one that is missed least,
which is not the paper's method. The plan says so, layer by layer: ``exact`` of its options.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.families import Family, family_of
from models.moe_layers import MoELayer, find_moe_layers, require_gated_outputs
from moe_spec.errors import UserError
from pruning.apply import slice_rows
from pruning.collect import run_backbone
from pruning.criteria.scores import finite
from pruning.inputs import valid_tokens
from pruning.layers import LayerShape, shapes_of
from pruning.observe import Seen, observed, outputs_of_all

MAX_SUBSETS = 1000
"""A layer with more of them is not searched but emptied one by one. Of 8 experts there are at most 70 subsets."""

MAX_TOKENS = 4096
"""The first so many tokens of the calibration data are looked at: the outputs of all experts on them are in memory."""

Keep = tuple[int, ...]
Router = Callable[[Tensor], tuple[Tensor, ...]]
"""Logits (T, E), weights (T, K) and expert ids (T, K), and what else a family gives, of (T, H)."""

Loss = Callable[[Keep], float]
"""How much the layer's output changes when it keeps these experts."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What the search gave for one layer.

    Attributes:
        keep: ids of the experts that stay, ascending.
        scores: (E,) the loss where the expert alone is missing; higher is missed more.
        exact: whether all subsets were tried.
        loss: of ``keep``.
    """

    keep: Keep
    scores: tuple[float, ...]
    exact: bool
    loss: float


def search_model(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], counts: Sequence[int]
) -> tuple[Found, ...]:
    """For every MoE layer the ``counts[layer]`` experts that reconstruct its output best on ``batches``.

    Padding (``attention_mask`` 0) is not looked at, nor are tokens after the first `MAX_TOKENS`.

    Raises:
        UserError: a layer keeps fewer than K experts, routes in groups, which subsets would break, or has gates that
            multiply what experts read; or outputs of experts are not finite.
    """
    layers, row = find_moe_layers(model), family_of(model.config)
    for layer, shape, count in zip(layers, shapes_of(layers), counts, strict=True):
        require_gated_outputs(layer, "subsets cannot be told by outputs")
        check_search(shape, count)
    seen, axes = _hidden_states(model, batches)
    with torch.no_grad():
        return tuple(
            search(
                layer_loss(layer, hidden_TH, narrowing(model, layer, row, axes[layer.name])), layer.num_experts, count
            )
            for layer, hidden_TH, count in zip(layers, seen, counts, strict=True)
        )


def search(loss: Loss, experts: int, count: int) -> Found:
    """The subset of ``count`` of ``experts`` with the smallest loss; of equal ones the first in ascending order."""
    loss = functools.cache(loss)  # what misses one expert is asked for twice, and the best once more
    everyone = tuple(range(experts))
    scores = tuple(loss(_without(everyone, expert)) for expert in everyone) if experts > count else (0.0,) * experts
    if math.comb(experts, count) <= MAX_SUBSETS:
        keep = min(itertools.combinations(everyone, count), key=loss)
        return Found(keep, scores, exact=True, loss=loss(keep))
    keep = everyone
    while len(keep) > count:
        keep = min((_without(keep, expert) for expert in keep), key=loss)
    return Found(keep, scores, exact=False, loss=loss(keep))


def layer_loss(layer: MoELayer, hidden_TH: Tensor, narrowed: Callable[[Keep], Router]) -> Loss:
    """The Frobenius norm of the change of the routed experts' sum (T, H), over the tokens ``hidden_TH``.

    The loss raises a `UserError` where it is infinite or no number.
    """
    outputs_TEH = outputs_of_all(layer, hidden_TH).transpose(0, 1)

    def result(keep: Keep) -> Tensor:
        _, gates_TK, ids_TK, *_ = narrowed(keep)(hidden_TH)
        chosen_TK = torch.tensor(keep)[ids_TK]
        outputs_TKH = outputs_TEH.gather(1, chosen_TK[..., None].expand(-1, -1, outputs_TEH.shape[-1]))
        sum_TH: Tensor = (outputs_TKH * gates_TK[..., None]).sum(dim=1)
        return sum_TH.double()

    whole_TH = result(tuple(range(layer.num_experts)))

    def loss(keep: Keep) -> float:
        norm = float((result(keep) - whole_TH).norm())
        finite(layer.name, np.array(norm))
        return norm

    return loss


def narrowing(model: nn.Module, layer: MoELayer, row: Family, axes: int) -> Callable[[Keep], Router]:
    """Copies of a layer's router, which reads ``axes`` axes, over some experts only: no other can be selected."""
    block = model.get_submodule(layer.name)

    def narrowed(keep: Keep) -> Router:
        router = copy.deepcopy(layer.router)
        for name in row.router_tensors:
            slice_rows(router, name, keep, layer.num_experts)
        setattr(router, row.experts_count, len(keep))
        biases = [getattr(block, name)[list(keep)] for name in row.block_tensors]  # the block gives them to its router
        return lambda hidden_TH: router(hidden_TH if axes == 2 else hidden_TH[None], *biases)

    return narrowed


def _without(keep: Keep, expert: int) -> Keep:
    return tuple(other for other in keep if other != expert)


def check_search(layer: LayerShape, count: int) -> None:
    """Refuse a layer whose subsets of ``count`` experts cannot be tried.

    Raises:
        UserError: it keeps fewer than K experts, or routes in groups, which subsets would break.
    """
    if layer.groups is not None:
        raise UserError(
            f"layer {layer.name} routes in {layer.groups.count} groups, and subsets of its experts would break them",
            hint="use a criterion that ranks experts within groups, like --criterion reap",
        )
    if not layer.top_k <= count <= layer.experts:
        raise UserError(
            f"layer {layer.name} would keep {count} of {layer.experts} experts, "
            f"but its router selects K={layer.top_k} a token",
            hint=f"keep {layer.top_k} to {layer.experts}",
        )


def _hidden_states(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> tuple[list[Tensor], dict[str, int]]:
    """What the experts of each layer read, (T, H), of the first valid tokens; and in how many axes its router does."""
    layers = find_moe_layers(model)
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    axes: dict[str, int] = {}
    batch: Mapping[str, Tensor] = {}

    def note(layer: MoELayer, seen: Seen) -> None:
        valid_T = valid_tokens(batch, layer.name)
        parts[layer.name].append(seen.hidden_TH if valid_T is None else seen.hidden_TH[valid_T])

    def note_axes(name: str, _router: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        axes[name] = inputs[0].dim()

    with contextlib.ExitStack() as stack:
        stack.enter_context(observed(model, note))
        for layer in layers:
            hook = functools.partial(note_axes, layer.name)
            stack.enter_context(layer.router.register_forward_pre_hook(hook))
        for batch in batches:
            run_backbone(model, batch)
            if sum(map(len, next(iter(parts.values())))) >= MAX_TOKENS:
                break
    return [torch.cat(hidden)[:MAX_TOKENS] for hidden in parts.values()], axes
