"""The MoE layers of a torch model."""

import dataclasses
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from models.families import Family, Score, family
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
    row = family(model.config.model_type)
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
    return tuple(_layer(name, block, row) for name, block in blocks)


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


def set_top_k(model: PreTrainedModel, layer: MoELayer, top_k: int) -> None:
    """Let every token select ``top_k`` experts of ``layer``, a layer of ``model``; the config stays as it is."""
    count = family(model.config.model_type).top_k_count
    for module in (model.get_submodule(layer.name), layer.router):
        if hasattr(module, count):
            setattr(module, count, top_k)


def _layer(name: str, block: nn.Module, row: Family) -> MoELayer:
    router = getattr(block, row.router)
    groups = None if row.group_counts is None else Groups(*(getattr(router, count) for count in row.group_counts))
    return MoELayer(
        name=name,
        router=router,
        experts=getattr(block, row.experts),
        num_experts=getattr(router, row.experts_count),
        top_k=getattr(router, row.top_k_count),
        hidden_size=getattr(router, row.router_tensors[0]).shape[-1],
        score=row.score,
        groups=groups,
        expert_choice=getattr(block, "expert_choice", False),
    )
