"""Llama 4: gates multiply what an expert reads, and every expert ran on every token.

The gate is the sigmoid of an expert's logit, among the K best; https://ai.meta.com/blog/llama-4-multimodal-intelligence.
"""

from typing import Any

from torch import Tensor, nn

from models.moe_block import StackedExperts, TopKRouter


class Llama4Moe(nn.Module):
    """Routed experts and a shared one."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        experts = block.experts
        self.router = TopKRouter(block.router.weight, block.top_k, score="sigmoid", renormalize=False)
        self.experts = StackedExperts(
            experts.gate_up_proj,
            experts.down_proj,
            experts.act_fn,
            transposed=True,
            gates_input=True,
        )
        self.shared_expert = block.shared_expert

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The mix (T, H), as the decoder layer wants it, and the router's logits (T, E)."""
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        logits_TE, gates_TK, ids_TK = self.router(hidden_TH)
        return self.shared_expert(hidden_TH) + self.experts(hidden_TH, ids_TK, gates_TK), logits_TE
