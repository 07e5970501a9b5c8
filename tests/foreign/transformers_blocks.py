"""MoE blocks of transformers that have experts of their own kind: Llama 4's, and Switch Transformers', mended."""

import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig, SwitchTransformersConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

from tests.foreign.inputs import HIDDEN
from tests.foreign.parts import EXPERTS, WIDTH, randomised


class _Router(SwitchTransformersTop1Router):
    """Without the line that replaces the classifier in every call, which torch.export refuses."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.classifier(hidden_states)
        probabilities = nn.functional.softmax(logits, dim=-1)
        chosen = nn.functional.one_hot(torch.argmax(probabilities, dim=-1), num_classes=self.num_experts)
        chosen = chosen * (torch.cumsum(chosen, dim=-2) <= self.expert_capacity)
        return chosen, torch.max(probabilities, dim=-1).values.unsqueeze(-1), logits


class _Experts(SwitchTransformersExperts):
    """Every expert computes every token, instead of a loop over those that were hit."""

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        gates_TE = selected_experts.squeeze(1) * routing_weights
        out_TH = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            out_TH = out_TH + self[f"expert_{e}"](hidden_states) * gates_TE[:, e, None]
        return out_TH


def switch() -> nn.Module:
    """Top-1, two tokens of each sequence fit into an expert."""
    config = SwitchTransformersConfig(
        d_model=HIDDEN, d_ff=WIDTH, num_heads=2, d_kv=8, num_experts=EXPERTS, expert_capacity=2, router_bias=False
    )
    block = SwitchTransformersSparseMLP(config)
    block.router, block.experts = _Router(config), _Experts(config)
    return randomised(block)


def llama4() -> nn.Module:
    """Top-1, the sigmoid of its logit multiplies the experts' *input*; a shared expert."""
    config = Llama4TextConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_attention_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
    )
    return randomised(Llama4TextMoe(config))
