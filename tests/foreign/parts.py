"""What hand-written MoE layers share: experts, a residual stack, random weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.foreign.inputs import HIDDEN

EXPERTS, TOP_K, WIDTH = 8, 2, 24


class Mlp(nn.Module):
    """An expert with one activation and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(HIDDEN, WIDTH)
        self.fc2 = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """An expert as in Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.w2 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Branches(nn.Module):
    """A router and a module an expert; what happens between them is a form."""

    def __init__(self, router: nn.Module, expert: type[nn.Module]) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))


class Residual(nn.Module):
    """``x + moe(norm(x))`` for each layer, as deep as there are layers."""

    def __init__(self, *moes: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in moes)
        self.moes = nn.ModuleList(moes)

    def forward(self, x: Tensor) -> Tensor:
        for norm, moe in zip(self.norms, self.moes, strict=True):
            x = x + moe(norm(x))
        return x


def residual(moe: Callable[[], nn.Module], *, layers: int) -> Callable[[], nn.Module]:
    """Makes a model of ``layers`` MoE layers, with weights that are always the same."""
    return lambda: randomised(Residual(*(moe() for _ in range(layers))))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in eval mode, everything but its norms from normal(0, 0.3): routing with margins, biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in norms and tensor.is_floating_point():
            tensor.data.normal_(0, 0.3, generator=generator)
    return model.eval()
