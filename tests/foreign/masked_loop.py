"""One branch an expert, each computing every token; a slice of the gates multiplies what it gives."""

import torch
from torch import Tensor, nn

from tests.foreign.inputs import HIDDEN
from tests.foreign.parts import EXPERTS


class GateSlices(nn.Module):
    """``out = out + gates[:, e:e+1] * expert(x)`` with gates scattered from the top-k."""

    def __init__(self, router: nn.Module, expert: type[nn.Module]) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        gates_TE = torch.zeros(x_TH.shape[0], EXPERTS, dtype=x_TH.dtype).scatter(1, ids_TK, weights_TK)
        out_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            out_TH = out_TH + gates_TE[:, e : e + 1] * expert(x_TH)
        return out_TH


class IdMasks(nn.Module):
    """The gate of an expert is the sum of the weights whose id it is."""

    def __init__(self, router: nn.Module, expert: type[nn.Module]) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        out_TH = torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            gate_T = torch.where(ids_TK == e, weights_TK, 0.0).sum(dim=-1)
            out_TH = out_TH + expert(x_TH) * gate_T.unsqueeze(-1)
        return out_TH


class Stack(nn.Module):
    """Outputs of all experts side by side, weighed and summed at once."""

    def __init__(self, router: nn.Module, expert: type[nn.Module]) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH)
        gates_TE = torch.zeros(x_TH.shape[0], EXPERTS, dtype=x_TH.dtype).scatter(1, ids_TK, weights_TK)
        out_TEH = torch.stack([expert(x_TH) for expert in self.experts], dim=1)
        return (gates_TE.unsqueeze(-1) * out_TEH).sum(dim=1)


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
