"""Every expert computes every token, from three-dimensional weights; gates pick what counts."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tests.foreign.exporters import dynamo, external, opset_18, opset_23, torchscript, unoptimized
from tests.foreign.foreign import Foreign
from tests.foreign.inputs import HALF_TOKENS, HIDDEN, HIDDEN_STATES, TOKENS
from tests.foreign.parts import EXPERTS, WIDTH, residual
from tests.foreign.routers import (
    INPUT_GATE,
    RENORMALISED,
    SIGMOID,
    TOP_K_FIRST,
    SigmoidBias,
    SoftmaxTopK,
    TopKSoftmax,
)
from tests.foreign.transformers_blocks import llama4


class Bmm(nn.Module):
    """One batched product a projection, SwiGLU with gate and up in one weight, gates scattered."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, 2 * WIDTH))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        gates_TE = torch.zeros(x_TH.shape[0], EXPERTS, dtype=x_TH.dtype).scatter(1, ids_TK, weights_TK)
        x_ETH = x_TH.unsqueeze(0).expand(EXPERTS, -1, -1)
        gate_ETF, up_ETF = torch.bmm(x_ETH, self.gate_up_proj).chunk(2, dim=-1)
        out_ETH = torch.bmm(nn.functional.silu(gate_ETF) * up_ETF, self.down_proj)
        return (out_ETH * gates_TE.t().unsqueeze(-1)).sum(dim=0)


class Matmul(nn.Module):
    """Broadcast products with biases, weights stored as nn.Linear would (E, out, in), gates a sum of one-hots."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.w1 = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))
        self.b1 = nn.Parameter(torch.empty(EXPERTS, 1, WIDTH))
        self.w2 = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.b2 = nn.Parameter(torch.empty(EXPERTS, 1, HIDDEN))

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        gates_TE = (nn.functional.one_hot(ids_TK, EXPERTS) * weights_TK.unsqueeze(-1)).sum(dim=1)
        hidden_ETF = nn.functional.gelu(torch.matmul(x_TH, self.w1.transpose(1, 2)) + self.b1)
        out_ETH = torch.matmul(hidden_ETF, self.w2.transpose(1, 2)) + self.b2
        return torch.einsum("te,eth->th", gates_TE.to(x_TH.dtype), out_ETH)


class Einsum(nn.Module):
    """Products in index notation; SwiGLU with weights of their own."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.gate = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.up = nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        gates_TE = (nn.functional.one_hot(ids_TK, EXPERTS).to(x_TH.dtype) * weights_TK.unsqueeze(-1)).sum(dim=1)
        gate_TEF = torch.einsum("th,ehf->tef", x_TH, self.gate)
        up_TEF = torch.einsum("th,ehf->tef", x_TH, self.up)
        out_TEH = torch.einsum("tef,efh->teh", nn.functional.silu(gate_TEF) * up_TEF, self.down)
        return torch.einsum("teh,te->th", out_TEH, gates_TE)


class GptOss(nn.Module):
    """transformers' own dense path of GPT-OSS before 5.0: tokens repeated, gate and up interleaved and clamped."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, 2 * WIDTH))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(EXPERTS, 2 * WIDTH))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN))
        self.down_proj_bias = nn.Parameter(torch.empty(EXPERTS, HIDDEN))

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        scores_TE = torch.zeros(x_TH.shape[0], EXPERTS, dtype=x_TH.dtype).scatter_(1, ids_TK, weights_TK)
        x_ETH = x_TH.repeat(EXPERTS, 1).view(EXPERTS, -1, HIDDEN)
        gate_up = torch.bmm(x_ETH, self.gate_up_proj) + self.gate_up_proj_bias[..., None, :]
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
        glu = gate * torch.sigmoid(gate * 1.702)
        out_ETH = torch.bmm((up + 1) * glu, self.down_proj) + self.down_proj_bias[..., None, :]
        out_ETH = out_ETH * scores_TE.transpose(0, 1).view(EXPERTS, -1)[..., None]
        return out_ETH.sum(dim=0)


_stacked = partial(Foreign, "stacked")
_bmm = residual(lambda: Bmm(SoftmaxTopK()), layers=2)
_matmul = residual(lambda: Matmul(TopKSoftmax()), layers=2)
_einsum = residual(lambda: Einsum(SigmoidBias()), layers=2)
_gpt_oss = residual(lambda: GptOss(TopKSoftmax()), layers=2)
_functions = partial(torchscript, functions={Bmm})


def _half() -> nn.Module:
    return _bmm().half()


STACKED: Mapping[str, Foreign] = {
    "stacked_bmm": _stacked(RENORMALISED, _bmm, TOKENS, dynamo, layers=2),
    "stacked_bmm_unoptimized": _stacked(RENORMALISED, _bmm, TOKENS, unoptimized, layers=2),
    "stacked_bmm_torchscript": _stacked(RENORMALISED, _bmm, TOKENS, torchscript, layers=2),
    "stacked_bmm_external": _stacked(RENORMALISED, _bmm, TOKENS, external, layers=2),
    "stacked_bmm_half": _stacked(RENORMALISED, _half, HALF_TOKENS, torchscript, layers=2),
    "stacked_bmm_functions": _stacked(RENORMALISED, _bmm, TOKENS, _functions, layers=2),
    "stacked_matmul_opset_18": _stacked(TOP_K_FIRST, _matmul, TOKENS, opset_18, layers=2),
    "stacked_matmul_torchscript": _stacked(TOP_K_FIRST, _matmul, TOKENS, torchscript, layers=2),
    "stacked_einsum_opset_23": _stacked(SIGMOID, _einsum, TOKENS, opset_23, layers=2),
    "stacked_einsum_torchscript": _stacked(SIGMOID, _einsum, TOKENS, torchscript, layers=2),
    "stacked_gpt_oss": _stacked(TOP_K_FIRST, _gpt_oss, TOKENS, dynamo, layers=2),
    "stacked_gpt_oss_torchscript": _stacked(TOP_K_FIRST, _gpt_oss, TOKENS, torchscript, layers=2),
    "stacked_llama4": _stacked(INPUT_GATE, llama4, HIDDEN_STATES, dynamo, top_k=1),
    "stacked_llama4_torchscript": _stacked(INPUT_GATE, llama4, HIDDEN_STATES, torchscript, top_k=1),
}
