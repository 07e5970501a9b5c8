"""JetMoE (https://arxiv.org/abs/2404.07413): experts of its MLPs. The experts of its attention stay as they are."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.core_model_loading import WeightRenaming, WeightTransform

from models.moe_block import SparseMoe, StackedExperts, TopKRouter


class JetMoeMoe(SparseMoe):
    """The experts' mix plus a bias that all tokens get."""

    def __init__(self, block: Any) -> None:
        router = TopKRouter(block.router.layer.weight, block.router.top_k)
        experts = StackedExperts(block.input_linear.weight, block.output_linear.weight, block.activation)
        super().__init__(router, experts)
        self.bias = nn.Parameter(block.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Of the shape of ``hidden``."""
        return self.mixed(hidden) + self.bias


class JetMoeStaticAttention(nn.Module):
    """The experts of the attention, in shapes that no value decides: none is pruned, but all are exported.

    An expert makes queries of a token, and another product what the attention gave for them a part of the output.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router, self.top_k = block.router, block.top_k
        self.input_linear, self.output_linear, self.bias = block.input_linear, block.output_linear, block.bias

    def map(self, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, S, K, N) of the K experts, the router's logits (T, E), and the gates (T, K, E)."""
        hidden_TH = hidden_BSH.flatten(0, 1)
        logits_TE = self.router.layer(hidden_TH).float()
        best_TK, ids_TK = logits_TE.topk(self.top_k, dim=-1)
        chosen_TKE = functional.one_hot(ids_TK, self.router.num_experts).to(hidden_TH.dtype)
        gates_TKE = chosen_TKE * best_TK.softmax(dim=-1).to(hidden_TH.dtype)[..., None]
        queries_TEN = torch.einsum("th,enh->ten", hidden_TH, self.input_linear.weight)
        queries_TKN = chosen_TKE @ queries_TEN
        return queries_TKN.view(*hidden_BSH.shape[:2], *queries_TKN.shape[1:]), logits_TE, gates_TKE

    def reduce(self, attended_BSKN: Tensor, gates_TKE: Tensor) -> Tensor:
        """What the K experts make of what was attended to, times their gates, (B, S, H)."""
        gated_TEN = gates_TKE.mT @ attended_BSKN.flatten(0, 1)
        mixed_TH = torch.einsum("ten,ehn->th", gated_TEN, self.output_linear.weight)
        output_BSH: Tensor = mixed_TH.view(*attended_BSKN.shape[:2], -1) + self.bias
        return output_BSH


def conversions() -> list[WeightTransform]:
    """Names in the files are those of transformers' own block."""
    return [
        WeightRenaming("mlp.input_linear.weight", "mlp.experts.gate_up_proj"),
        WeightRenaming("mlp.output_linear.weight", "mlp.experts.down_proj"),
        WeightRenaming("mlp.router.layer.weight", "mlp.router.weight"),
    ]
