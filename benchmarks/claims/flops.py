"""Floating-point operations of a forward pass, counted while it runs: two for every product that is added up."""

import dataclasses

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from models.families import family
from models.moe_layers import find_moe_layers
from pruning.finetuning.examples import Inputs


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of products of matrices, convolutions and attention; what is linear in a tensor's size is left out.

    Attributes:
        total: of the whole model.
        experts: of the experts that tokens were given to.
    """

    total: int
    experts: int

    def fewer_than(self, other: "Flops") -> float:
        """The share of the other's that this one saves."""
        return 1 - self.total / other.total


def count_flops(model: PreTrainedModel, feeds: Inputs) -> Flops:
    """Run ``model`` once on ``feeds``; its experts run one by one from then on.

    torch counts what its operators are asked for. Experts run one by one and attention as two products, because torch
    knows nothing of the fused operators; all pairs of tokens count, also those that a causal mask hides.
    """
    model.set_experts_implementation("eager")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**feeds)
    by_module, attribute = counter.get_flop_counts(), family(model.config.model_type).experts
    names = [f"{type(model).__name__}.{layer.name}.{attribute}" for layer in find_moe_layers(model)]
    return Flops(counter.get_total_flops(), sum(sum(by_module[name].values()) for name in names))
