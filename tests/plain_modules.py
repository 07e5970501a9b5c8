"""Torch modules that no family is of, each with its adapter: one made at home, one from a package."""

import mixture_of_experts
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.moe_block import SparseMoe, StackedExperts, TopKRouter
from models.plain import PlainModel, plain_model

EXPERTS, HIDDEN, WIDTH = 6, 16, 24


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class HomeMade(nn.Module):
    """A loop over experts, as many a repository has it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x):
        weights, chosen = self.gate(x).topk(2, dim=-1)
        weights = weights.softmax(dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slots = torch.where((chosen == number).flatten(0, -2))
            flat_x, flat_out = x.flatten(0, -2), out.view(-1, HIDDEN)
            flat_out[rows] += weights.flatten(0, -2)[rows, slots, None] * expert(flat_x[rows])
        return out


class Net(nn.Module):
    """Two blocks with residuals around them, and a head."""

    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x):
        for block in self.blocks:
            given = block(x)
            x = self.norm(x + (given[0] if isinstance(given, tuple) else given))
        return self.head(x), x.mean(dim=1)


def home_made_adapter(block):
    def stacked(name):
        return torch.stack([getattr(expert, name) for expert in block.experts])

    for expert in block.experts:
        expert.up, expert.up_bias = (
            torch.cat((getattr(expert.w1, one), getattr(expert.w3, one))) for one in ("weight", "bias")
        )
        expert.down, expert.down_bias = expert.w2.weight.detach(), expert.w2.bias.detach()
    router = TopKRouter(block.gate.weight, 2, bias_E=block.gate.bias)
    biases = {"up_bias_EN": stacked("up_bias"), "down_bias_EH": stacked("down_bias")}
    return SparseMoe(router, StackedExperts(stacked("up"), stacked("down"), functional.silu, **biases))


class PackageBlock(SparseMoe):
    """Gives a loss beside its output."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.mixed(hidden), hidden.new_zeros(())


def package_adapter(block):
    router = TopKRouter(block.gate.w_gating.T, 2)
    experts = block.experts
    return PackageBlock(router, StackedExperts(experts.w1, experts.w2, experts.act, gated=False, transposed=True))


def package_block():
    """Both choices always count, and every expert has a place for every token."""
    return mixture_of_experts.MoE(
        HIDDEN, EXPERTS, WIDTH, second_policy_eval="all", capacity_factor_eval=float(EXPERTS), activation=nn.GELU
    )


ADAPTERS = {"HomeMade": home_made_adapter, "MoE": package_adapter}
BLOCKS = {"HomeMade": HomeMade, "MoE": package_block}


def example(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return {"x": torch.randn(batch, length, HIDDEN, generator=generator)}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = Net(BLOCKS[name])
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def adapted_net(name: str) -> PlainModel:
    return plain_model(net(name), {name: ADAPTERS[name]}, example, outputs=("scores", "pooled"))
