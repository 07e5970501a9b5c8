"""The MoE layers of a torch model."""

import copy
import dataclasses
import operator
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from models.families import GROUP_COUNTS, Family, Score, family_of
from moe_spec.errors import UserError
from moe_spec.feasibility import Groups


@dataclasses.dataclass(frozen=True)
class MoELayer:
    """One MoE block.

    Attributes:
        name: module path of the block that holds router and experts, e.g. ``model.layers.0.mlp``.
        router: gives ids and weights.
        experts: the routed FFNs, as stacked weights with E on axis 0.
        num_experts: E.
        top_k: K.
        hidden_size: H.
        score: what the router makes of its logits.
        groups: group-limited routing, if the router has it.
        expert_choice: whether each expert chooses its tokens, instead of each token its experts. K is 1 then, and
            nothing is selected by it; the router gives logits, gates and ids of tokens, in shapes of its own.
    """

    name: str
    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int
    hidden_size: int
    score: Score
    groups: Groups | None
    expert_choice: bool = False


def find_moe_layers(model: PreTrainedModel) -> tuple[MoELayer, ...]:
    """The MoE layers in model order.

    Raises:
        UserError: the model is of no known family, or has no MoE layer.
    """
    row = family_of(model.config)
    blocks = [
        (name, block)
        for name, block in model.named_modules()
        if isinstance(getattr(block, row.router, None), nn.Module)
        and isinstance(getattr(block, row.experts, None), nn.Module)
    ]
    if not blocks:
        raise UserError(
            f"the {row.model_type} model has no MoE layer: none of its modules holds "
            f"{row.router!r} and {row.experts!r}",
            hint="give a model with experts; a dense one has nothing to prune",
        )
    score = row.score if row.score_key is None else getattr(model.config.get_text_config(), row.score_key)
    return tuple(_layer(name, block, row, score) for name, block in blocks)


def tensors_by_expert(model: PreTrainedModel) -> dict[str, MoELayer]:
    """The parameters and buffers with a value or row for each expert, routers' and experts', and whose layer they are.

    Raises:
        UserError: see `find_moe_layers`.
    """
    row = family_of(model.config)
    tensors = {}
    for layer in find_moe_layers(model):
        experts = (f"{row.experts}.{name}" for name, _ in layer.experts.named_parameters(recurse=False))
        tensors.update({f"{layer.name}.{name}": layer for name in (*row.routing_tensors, *experts)})
    return tensors


def tensors_of_routers(model: PreTrainedModel) -> set[str]:
    """The parameters and buffers that choose experts: those of routers, and those that blocks hold for them.

    Raises:
        UserError: see `find_moe_layers`.
    """
    row, names = family_of(model.config), model.state_dict().keys()
    layers = find_moe_layers(model)
    routers = tuple(f"{layer.name}.{row.router}." for layer in layers)
    held = {f"{layer.name}.{name}" for layer in layers for name in row.block_tensors}
    return {name for name in names if name.startswith(routers) or name in held}


def require_token_choice(layers: Iterable[MoELayer]) -> None:
    """Refuse to watch what tokens choose where none does.

    Raises:
        UserError: in a layer experts choose.
    """
    for layer in layers:
        if layer.expert_choice:
            raise UserError(
                f"in layer {layer.name} experts choose their tokens, but what is looked at are tokens that choose "
                "experts",
                hint="plan without data: --criterion router-norm, aimer or random; fine-tune with --method plain or "
                "router-kd",
            )


def require_gated_outputs(layer: MoELayer, what: str) -> None:
    """Refuse ``what``, which takes an expert's output for independent of its gate, where it is not.

    Raises:
        UserError: gates multiply what the experts of the layer read.
    """
    if getattr(layer.experts, "gates_input", False):
        raise UserError(
            f"in layer {layer.name} gates multiply what experts read instead of what they give, so {what}",
            hint="drop experts with their rows of the router: --router rows, by a criterion of statistics",
        )


def set_top_k(model: PreTrainedModel, layer: MoELayer, top_k: int) -> None:
    """Let every token select ``top_k`` experts of ``layer``, a layer of ``model``; the model's config stays as it is.

    Raises:
        UserError: the family's routers select as many as ever.
    """
    row = family_of(model.config)
    if row.fixed_top_k and top_k != layer.top_k:
        raise UserError(
            f"every router of a {row.model_type} model selects K={layer.top_k} experts, so layer {layer.name} "
            f"cannot select {top_k}",
            hint=f"keep at least {layer.top_k} experts in every layer",
        )
    block = model.get_submodule(layer.name)
    for path in row.holders_of_top_k:
        holder, _, count = path.rpartition(".")
        parent, _, name = holder.rpartition(".")
        if name == "config":  # the one that all routers share: this one gets its own
            shared = operator.attrgetter(holder)(block)
            setattr(block.get_submodule(parent), name, copy.copy(shared))
        owner = operator.attrgetter(holder)(block) if holder else block
        if hasattr(owner, count):
            setattr(owner, count, top_k)


def axis_of_experts(tensor: torch.Tensor, experts: int) -> int:
    """Where a tensor of ``Family.routing_tensors`` has its E: on axis 0, or behind an axis of length 1."""
    return 0 if tensor.shape[0] == experts else 1


def _layer(name: str, block: nn.Module, row: Family, score: Score) -> MoELayer:
    router, experts = getattr(block, row.router), getattr(block, row.experts)
    if not hasattr(experts, "is_transposed"):  # as the interface's decorator, and our adapters, leave it behind
        raise UserError(
            f"the experts of layer {name} are a {type(experts).__name__}, which is not behind transformers' experts "
            "interface",
            hint="without --trust-remote-code transformers' own class is taken, where it has one; or say in three "
            "lines of Python what a block computes, see models/plain.py",
        )
    down = experts.down_proj
    return MoELayer(
        name=name,
        router=router,
        experts=experts,
        num_experts=getattr(experts, row.experts_count),
        top_k=operator.attrgetter(row.holders_of_top_k[0])(block),
        hidden_size=down.shape[2 if experts.is_transposed else 1],
        score=score,
        groups=_groups(router, row),
        expert_choice=getattr(block, "expert_choice", False),
    )


def _groups(router: nn.Module, row: Family) -> Groups | None:
    if row.scored_by is None or getattr(router, "topk_method", None) == "greedy":
        return None
    count, selected = (getattr(router, name) for name in GROUP_COUNTS)
    return None if count is None else Groups(count, selected, row.scored_by)
