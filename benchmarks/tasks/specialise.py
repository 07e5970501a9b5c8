"""How far the experts of one model specialise: which of them each task uses, and how differently."""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from benchmarks.markdown import table
from benchmarks.tasks.metrics import expert_usage, total_variation
from models.moe_layers import find_moe_layers
from moe_spec.dataset import Dataset

Shares = npt.NDArray[np.float64]
"""(L, E): of the selections in each MoE layer."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """Shares on the even and on the odd examples of a task: how they differ is what chance makes."""

    even_LE: Shares
    odd_LE: Shares

    @property
    def shares_LE(self) -> Shares:
        """On all of them."""
        return (self.even_LE + self.odd_LE) / 2


def measure_usage(model: PreTrainedModel, data: Dataset) -> Usage:
    """Run both halves of ``data``."""

    def half(start: int) -> Dataset:
        return dataclasses.replace(data, feeds={name: array[start::2] for name, array in data.feeds.items()})

    return Usage(expert_usage(model, half(0)), expert_usage(model, half(1)))


def document(model: PreTrainedModel, usages: Mapping[str, Usage]) -> str:
    """Two tables: distances between tasks, and the shares themselves.

    Args:
        model: that the tasks share.
        usages: by task.
    """
    layers = [layer.name for layer in find_moe_layers(model)]
    between = {
        f"{one} and {other}": total_variation(usages[one].shares_LE, usages[other].shares_LE)
        for one, other in itertools.combinations(usages, 2)
    }
    within = {f"two halves of {name}": total_variation(use.even_LE, use.odd_LE) for name, use in usages.items()}
    distances = ((name, *(f"{value:.2f}" for value in values_L)) for name, values_L in (between | within).items())
    shares = (
        (layer, name, *(f"{share:.0%}" for share in use.shares_LE[index]))
        for index, layer in enumerate(layers)
        for name, use in usages.items()
    )
    experts = range(find_moe_layers(model)[0].num_experts)
    return f"""{", ".join(usages)} share a model. How differently they use its experts on test data, as the total
variation between the shares of selections: 0 where they are the same, 1 where no expert is used by both.

{table(("between", *layers), distances)}

The share of selections that each expert gets, in percent of a layer's:

{table(("layer", "task", *map(str, experts)), shares, left=2)}"""
