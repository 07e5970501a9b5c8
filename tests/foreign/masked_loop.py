"""One branch an expert, each computing every token; a slice of the gates multiplies what it gives."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tests.foreign.exporters import dynamo, torchscript
from tests.foreign.foreign import Foreign
from tests.foreign.inputs import HALF_TOKENS, HIDDEN, HIDDEN_STATES, IMAGES, TOKENS
from tests.foreign.parts import EXPERTS, TOP_K, WIDTH, Branches, Mlp, SwiGlu, randomised, residual
from tests.foreign.routers import (
    NOT_RENORMALISED,
    RENORMALISED,
    SIGMOID,
    SOFT,
    TOP_1,
    TOP_K_FIRST,
    SigmoidBias,
    SoftmaxTopK,
    TopKSoftmax,
)
from tests.foreign.transformers_blocks import switch


class GateSlices(Branches):
    """``out = out + gates[:, e:e+1] * expert(x)`` with gates scattered from the top-k."""

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        gates_TE = torch.zeros(x_TH.shape[0], EXPERTS, dtype=x_TH.dtype).scatter(1, ids_TK, weights_TK)
        out_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            out_TH = out_TH + gates_TE[:, e : e + 1] * expert(x_TH)
        return out_TH


class IdMasks(Branches):
    """The gate of an expert is the sum of the weights whose id it is."""

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        out_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            gate_T = torch.where(ids_TK == e, weights_TK, 0.0).sum(dim=-1)
            out_TH = out_TH + expert(x_TH) * gate_T.unsqueeze(-1)
        return out_TH


class Stack(Branches):
    """Outputs of all experts side by side, weighed and summed at once."""

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        gates_TE = torch.zeros(x_TH.shape[0], EXPERTS, dtype=x_TH.dtype).scatter(1, ids_TK, weights_TK)
        out_TEH = torch.stack([expert(x_TH) for expert in self.experts], dim=1)
        return (gates_TE.unsqueeze(-1) * out_TEH).sum(dim=1)


class Picked(Branches):
    """Outputs of all experts side by side, of which those of the top-k are gathered."""

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        out_TEH = torch.stack([expert(x_TH) for expert in self.experts], dim=1)
        picked_TKH = out_TEH.gather(1, ids_TK.unsqueeze(-1).expand(-1, -1, HIDDEN))
        return (weights_TK.unsqueeze(-1) * picked_TKH).sum(dim=1)


class Soft(nn.Module):
    """No selection at all: K = E, gates are the softmax (Jacobs et al. 1991)."""

    def __init__(self, expert: type[nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x_TH: Tensor) -> Tensor:
        gates_TE = torch.softmax(self.gate(x_TH), dim=-1)
        out_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            out_TH = out_TH + gates_TE[:, e : e + 1] * expert(x_TH)
        return out_TH


class Images(nn.Module):
    """Pooled features through 1 x 1 convolutions are the logits; gates (B, E, 1, 1) are sliced along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(HIDDEN, EXPERTS, 1))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(HIDDEN, WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(WIDTH, HIDDEN, 1))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        scores_BE11 = torch.softmax(self.router(x), dim=1)
        best, ids = torch.topk(scores_BE11, TOP_K, dim=1)
        best = best / best.sum(dim=1, keepdim=True).clamp_min(1e-6)
        gates_BE11 = torch.zeros_like(scores_BE11).scatter(1, ids, best)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * gates_BE11[:, e : e + 1]
        return x + out


_masked = partial(Foreign, "masked_loop")
_gates = partial(residual, lambda: GateSlices(SoftmaxTopK(renormalize=False), Mlp))
_ids = partial(residual, lambda: IdMasks(SigmoidBias(), SwiGlu))
_stack = partial(residual, lambda: Stack(TopKSoftmax(), Mlp))
_picked = residual(lambda: Picked(SoftmaxTopK(), SwiGlu), layers=2)
_soft = residual(lambda: Soft(SwiGlu), layers=2)
_functions = partial(torchscript, functions={GateSlices})


def _half() -> nn.Module:
    return _gates(layers=2)().half()


def _images() -> nn.Module:
    return randomised(Images())


MASKED_LOOP: Mapping[str, Foreign] = {
    "masked_loop_gates": _masked(NOT_RENORMALISED, _gates(layers=1), TOKENS, dynamo),
    "masked_loop_gates_torchscript": _masked(NOT_RENORMALISED, _gates(layers=2), TOKENS, torchscript, layers=2),
    "masked_loop_gates_half": _masked(NOT_RENORMALISED, _half, HALF_TOKENS, torchscript, layers=2),
    "masked_loop_gates_functions": _masked(NOT_RENORMALISED, _gates(layers=2), TOKENS, _functions, layers=2),
    "masked_loop_ids": _masked(SIGMOID, _ids(layers=1), TOKENS, dynamo),
    "masked_loop_ids_torchscript": _masked(SIGMOID, _ids(layers=2), TOKENS, torchscript, layers=2),
    "masked_loop_stack": _masked(TOP_K_FIRST, _stack(layers=1), TOKENS, dynamo),
    "masked_loop_stack_torchscript": _masked(TOP_K_FIRST, _stack(layers=2), TOKENS, torchscript, layers=2),
    "masked_loop_picked": _masked(RENORMALISED, _picked, TOKENS, torchscript, layers=2),
    "masked_loop_soft": _masked(SOFT, _soft, TOKENS, torchscript, layers=2, top_k=EXPERTS),
    "masked_loop_images": _masked(RENORMALISED, _images, IMAGES, torchscript),
    "masked_loop_switch": _masked(TOP_1, switch, HIDDEN_STATES, dynamo, top_k=1),
    "masked_loop_switch_torchscript": _masked(TOP_1, switch, HIDDEN_STATES, torchscript, top_k=1),
}
