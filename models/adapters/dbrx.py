"""DBRX: each of an expert's three matrices stands in one tensor with those of all others, (E F, H)."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from models.moe_block import SparseMoe, StackedExperts, TopKRouter
from moe_spec.errors import UserError


def adapt(block: Any) -> nn.Module:
    """Gates are divided by their sum, or not at all.

    Raises:
        UserError: they are divided by another norm.
    """
    norm, mlp = block.moe_normalize_expert_weights, block.experts.mlp
    if norm not in (None, 1):
        raise UserError(
            f"the config's moe_normalize_expert_weights is {norm}, but only 1, the sum, and null are known",
            hint="DBRX's published checkpoints have 1",
        )
    gate_EFH, up_EFH, down_EFH = (weight.unflatten(0, (mlp.moe_num_experts, -1)) for weight in (mlp.w1, mlp.v1, mlp.w2))
    experts = StackedExperts(torch.cat((gate_EFH, up_EFH), dim=1), down_EFH.mT.contiguous(), mlp.activation_fn)
    return SparseMoe(TopKRouter(block.router.layer.weight, block.top_k, renormalize=norm is not None), experts)


def conversions() -> list[WeightTransform]:
    """Names in the files are those of transformers' own block."""
    return [
        WeightRenaming("ffn.router.layer.weight", "ffn.router.weight"),
        WeightConverter(
            ["ffn.experts.mlp.w1", "ffn.experts.mlp.v1"],
            "ffn.experts.gate_up_proj",
            [SplitRows(), Concatenate(dim=1)],
        ),
        WeightConverter("ffn.experts.mlp.w2", "ffn.experts.down_proj", [SplitRows(), Transpose(1, 2)]),
    ]


class SplitRows(ConversionOps):
    """Every ``w (E F, H) -> w (E, F, H)``."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **told: Any) -> dict[str, Any]:
        """Under the same names; transformers tells the config, which says E."""
        experts = told["config"].ffn_config.moe_num_experts
        return {name: weight.reshape(experts, -1, weight.shape[1]) for name, weight in _each(input_dict)}

    @property
    def reverse_op(self) -> ConversionOps:
        """For saving."""
        return JoinRows()


class JoinRows(ConversionOps):
    """Every ``w (E, F, H) -> w (E F, H)``."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **_told: Any) -> dict[str, Any]:
        """Under the same names."""
        return {name: weight.flatten(0, 1) for name, weight in _each(input_dict)}

    @property
    def reverse_op(self) -> ConversionOps:
        """For loading."""
        return SplitRows()


def _each(tensors: Mapping[str, Tensor | list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The one tensor of each name, which transformers may have in a list."""
    return ((name, one[0] if isinstance(one, list) else one) for name, one in tensors.items())
