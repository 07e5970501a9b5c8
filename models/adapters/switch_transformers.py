"""Switch Transformers (https://arxiv.org/abs/2101.03961): one expert a token, and a capacity.

An expert takes the first ``expert_capacity`` tokens of a sequence that choose it; of later ones its block gives 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming, WeightTransform

from models.moe_block import StackedExperts, TopKRouter
from moe_spec.errors import UserError


class SwitchRouter(TopKRouter):
    """The best expert of each token; its gate is the expert's probability, or 0 where the expert is full.

    Raises:
        UserError: routers with a bias.
    """

    def __init__(self, router: Any) -> None:
        if router.classifier.bias is not None:
            raise UserError(
                "the config's router_bias is true, but routers without a bias are known only",
                hint="the published Switch Transformers have none",
            )
        super().__init__(router.classifier.weight, 1, renormalize=False)
        self.capacity: int = router.expert_capacity

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of B sequences of S tokens: logits (T, E) float32, gates (T, 1), expert ids (T, 1)."""
        logits_TE, gates_T1, ids_T1 = super().forward(hidden_BSH.flatten(0, 1))
        chosen_BSE = functional.one_hot(ids_T1.view(hidden_BSH.shape[:2]), self.num_experts)
        fits_BSE = chosen_BSE * (chosen_BSE.cumsum(dim=1) <= self.capacity)
        fits_T1 = fits_BSE.sum(dim=-1).view(-1, 1)
        return logits_TE, gates_T1 * fits_T1.to(gates_T1.dtype), ids_T1


class SwitchMoe(nn.Module):
    """Takes and gives (B, S, H)."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        experts = [block.experts[f"expert_{number}"] for number in range(block.experts.num_experts)]
        self.router = SwitchRouter(block.router)
        self.experts = StackedExperts(
            torch.stack([expert.wi.weight for expert in experts]),
            torch.stack([expert.wo.weight for expert in experts]),
            experts[0].act,
            gated=False,
        )

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Each token's expert's output times its gate."""
        _, gates_T1, ids_T1 = self.router(hidden_BSH)
        mixed_BSH: Tensor = self.experts(hidden_BSH.flatten(0, 1), ids_T1, gates_T1).view_as(hidden_BSH)
        return mixed_BSH


def conversions() -> list[WeightTransform]:
    """The files have one tensor an expert and projection."""
    return [
        WeightRenaming("mlp.router.classifier.weight", "mlp.router.weight"),
        WeightConverter("mlp.experts.expert_*.wi.weight", "mlp.experts.up_proj", [MergeModulelist(dim=0)]),
        WeightConverter("mlp.experts.expert_*.wo.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
    ]
