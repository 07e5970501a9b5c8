"""One MoE block in standard parts, which every part of moe-edge knows: what adapters make of a foreign block.

A router gives logits (T, E), weights (T, K) and ids (T, K); experts are stacked weights with E on axis 0, behind
transformers' experts interface. Parts are made of tensors: those of the foreign block, or empty ones of their shapes.

Axes beside those of ``moe_spec``: N is the width of the first projection, 2 F where it holds gate and up, else F.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": functools.partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
}
"""What makes scores of logits (T, E)."""

OURS = "moe_edge"
"""How the names of our experts functions begin: these know ``gates_input``."""


class HasImplementation(Protocol):
    """What of a transformers config the experts look at."""

    _experts_implementation: str | None


class TopKRouter(nn.Module):
    """Linear, scores in float32, the K best; gates are their scores."""

    def __init__(
        self,
        weight_EH: Tensor,
        top_k: int,
        *,
        bias_E: Tensor | None = None,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool = True,
    ) -> None:
        """A router of these values.

        Args:
            weight_EH: one row an expert.
            top_k: K.
            bias_E: added to the logits.
            score: what makes scores of all logits.
            renormalize: whether gates are divided by their sum. Then a softmax over all logits is one over the best K.
        """
        super().__init__()
        self.weight = nn.Parameter(weight_EH)
        self.bias = None if bias_E is None else nn.Parameter(bias_E)
        self.num_experts, self.top_k = weight_EH.shape[0], top_k
        self.score, self.renormalize = score, renormalize

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E) float32, gates (T, K) in the model's dtype, expert ids (T, K) int64."""
        bias = None if self.bias is None else self.bias.float()
        logits_TE = functional.linear(hidden_TH.float(), self.weight.float(), bias)
        gates_TK, ids_TK = torch.topk(SCORES[self.score](logits_TE), self.top_k, dim=-1)
        if self.renormalize:
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        return logits_TE, gates_TK.to(hidden_TH.dtype), ids_TK


def _one_by_one(experts: "StackedExperts", hidden_TH: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """``y_t = sum_k gates_tk f_{ids_tk}(x_t)``, (T, H): one expert after the other on the tokens it was given."""
    output_TH = torch.zeros_like(hidden_TH)
    for expert in torch.unique(ids_TK).tolist():
        token, choice = torch.where(ids_TK == expert)
        gates_N1 = gates_TK[token, choice, None]
        x_NH = hidden_TH[token] * gates_N1 if experts.gates_input else hidden_TH[token]
        y_NH = experts.of(expert, x_NH)
        output_TH.index_add_(0, token, y_NH if experts.gates_input else y_NH * gates_N1)
    return output_TH


class StackedExperts(nn.Module):
    """E feed-forward networks of two layers, the first gated or not. transformers' experts interface runs them.

    Attributes:
        gates_input: whether an expert gives ``f(gate x)`` instead of ``gate f(x)``, as Llama 4's do.
        config: of the model that holds them; says which experts function runs, eager without one.
    """

    _apply_gate = _default_apply_gate

    def __init__(
        self,
        up_ENH: Tensor,
        down_EHF: Tensor,
        act_fn: Callable[[Tensor], Tensor],
        *,
        up_bias_EN: Tensor | None = None,
        down_bias_EH: Tensor | None = None,
        gated: bool = True,
        transposed: bool = False,
        gates_input: bool = False,
    ) -> None:
        """Experts of these values.

        Args:
            up_ENH: first projection; gate in front of up where ``gated``.
            down_EHF: second projection.
            act_fn: of the gate, or of the first projection where there is none.
            up_bias_EN: added to the first projection; both biases or none.
            down_bias_EH: added to the second.
            gated: whether the first projection holds a gate.
            transposed: whether the projections are (E, H, N) and (E, F, H) instead.
            gates_input: see class.
        """
        super().__init__()
        self.config: HasImplementation | None = None
        self.act_fn = act_fn
        self.num_experts = up_ENH.shape[0]
        self.has_gate, self.has_bias, self.is_transposed = gated, up_bias_EN is not None, transposed
        self.is_concatenated, self.has_post_expert_norm, self._is_expert_parallel = True, False, False
        self.gates_input = gates_input
        self._up = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(self._up, nn.Parameter(up_ENH))
        self.down_proj = nn.Parameter(down_EHF)
        if up_bias_EN is not None and down_bias_EH is not None:
            self.register_parameter(f"{self._up}_bias", nn.Parameter(up_bias_EN))
            self.down_proj_bias = nn.Parameter(down_bias_EH)

    @functools.wraps(_one_by_one)  # whoever unwraps it gets the reference, as of transformers' own
    def forward(  # type: ignore[override] # a wrapped function is none for mypy
        self, hidden_TH: Tensor, ids_TK: Tensor, gates_TK: Tensor
    ) -> Tensor:
        """What the experts function of the config gives, (T, H)."""
        name = (self.config and self.config._experts_implementation) or "eager"
        if self.gates_input and not name.startswith(OURS):
            name = "eager"  # transformers' own functions multiply what experts give
        function: Any = ALL_EXPERTS_FUNCTIONS.get_interface(name, _one_by_one)
        mixed_TH: Tensor = function(self, hidden_TH, ids_TK, gates_TK)
        return mixed_TH

    def of(self, expert: int, x_NH: Tensor) -> Tensor:
        """``f_e(x)`` for each x, (N, H)."""
        middle = self._linear(self._up, expert, x_NH)
        middle = self._apply_gate(middle) if self.has_gate else self.act_fn(middle)
        return self._linear("down_proj", expert, middle)

    def _linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        kernel = self.get_parameter(name)[expert]
        bias = self.get_parameter(f"{name}_bias")[expert] if self.has_bias else None
        return functional.linear(x, kernel.T if self.is_transposed else kernel, bias)


class SparseMoe(nn.Module):
    """Router and experts in place of a foreign block, which takes and gives one tensor (..., H).

    A block that takes or gives more, or has shared experts, is a subclass with a ``forward`` of its own.
    """

    def __init__(self, router: nn.Module, experts: StackedExperts) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, hidden: Tensor) -> Any:
        """The experts' mix, of the shape of ``hidden``."""
        return self.mixed(hidden)

    def mixed(self, hidden: Tensor) -> Tensor:
        """The experts' mix, of the shape of ``hidden``."""
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        _, gates_TK, ids_TK = self.router(hidden_TH)
        mixed: Tensor = self.experts(hidden_TH, ids_TK, gates_TK).view_as(hidden)
        return mixed
