"""Routers that many hand-written MoE layers share, of eight experts each, and routers in words for the tables."""

import torch
from torch import Tensor, nn

from tests.foreign.inputs import HIDDEN
from tests.foreign.parts import EXPERTS, TOP_K

RENORMALISED = "softmax, top-k, renormalised"
NOT_RENORMALISED = "softmax, top-k"
TOP_K_FIRST = "top-k, softmax"
SOFTMAX_BIAS = "softmax, selection bias, top-k, renormalised"
SOFTMAX_GROUPS = "softmax, 2 of 4 groups, top-k, scaled"
SIGMOID = "sigmoid, selection bias, top-k, renormalised, scaled"
SIGMOID_GROUPS = "sigmoid, selection bias, 2 of 4 groups, top-k, renormalised, scaled"
SPARSEMIXER = "sparsemixer"
SOFT = "softmax"
TOP_1 = "softmax, argmax, capacity"
TOP_2 = "softmax, argmax twice, capacity, renormalised"
INPUT_GATE = "top-k, sigmoid on the input"


class SoftmaxTopK(nn.Module):
    """Softmax in float32, top-k, renormalised or not (Mixtral, OLMoE)."""

    def __init__(self, *, renormalize: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self._renormalize = renormalize

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = nn.functional.softmax(self.gate(x_TH), dim=-1, dtype=torch.float32)
        weights_TK, ids_TK = torch.topk(scores_TE, TOP_K, dim=-1)
        if self._renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return weights_TK.to(x_TH.dtype), ids_TK


class TopKSoftmax(nn.Module):
    """Top-k of the logits, softmax over those (GPT-OSS, Shazeer et al. 2017 without its noise)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        logits_TK, ids_TK = torch.topk(self.gate(x_TH), TOP_K, dim=-1)
        return nn.functional.softmax(logits_TK, dim=-1), ids_TK


class SigmoidBias(nn.Module):
    """Sigmoid, a bias for the choice only, renormalised, scaled (DeepSeek-V3 without groups)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.bias = nn.Buffer(torch.zeros(EXPERTS))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = torch.sigmoid(self.gate(x_TH))
        ids_TK = torch.topk(scores_TE + self.bias, TOP_K, dim=-1)[1]
        weights_TK = scores_TE.gather(1, ids_TK)
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_TK * 2.5, ids_TK
