"""How good a model is on task data, and which experts it uses there."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from moe_spec.dataset import Dataset
from pruning.collect import collect


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number that says how good a model is.

    Attributes:
        unit: what it is called.
        higher_is_better: whether more of it is better.
        measure: of a model in eval mode, on task data.
        spec: how it is shown, a format specification.
    """

    unit: str
    higher_is_better: bool
    measure: Callable[[PreTrainedModel, Dataset], float]
    spec: str


@torch.inference_mode()
def accuracy(model: PreTrainedModel, data: Dataset, batch_size: int = 250) -> float:
    """Share of labelled examples whose most probable class is the label."""
    predicted = [model(**feeds).logits.argmax(-1) for feeds in _batches(data, batch_size)]
    return float((torch.cat(predicted).numpy() == data.labels).mean())


@torch.inference_mode()
def perplexity(model: PreTrainedModel, data: Dataset, batch_size: int = 32) -> float:
    """``exp`` of the mean negative log-likelihood of every token but the first of each block; nothing is padded."""
    total, count = 0.0, 0
    for feeds in _batches(data, batch_size):
        logits_TV = model(**feeds, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        targets_T = feeds["input_ids"][:, 1:].flatten()
        total += functional.cross_entropy(logits_TV, targets_T, reduction="sum").item()
        count += len(targets_T)
    return math.exp(total / count)


ACCURACY = Metric("accuracy", True, accuracy, ".1%")
PERPLEXITY = Metric("perplexity", False, perplexity, ".1f")


def expert_usage(model: PreTrainedModel, data: Dataset, batch_size: int = 32) -> npt.NDArray[np.float64]:
    """(L, E): the share of the T * K selections that each expert of each MoE layer gets on ``data``."""
    layers = collect(model, _batches(data, batch_size))
    return np.stack([layer["tokens"] / layer["tokens"].sum() for layer in layers])


def total_variation(usage_LE: npt.NDArray[np.float64], other_LE: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(L,): the share of selections that would have to go to other experts to make both usages the same; 0 to 1.

    >>> total_variation(np.array([[0.5, 0.5, 0.0]]), np.array([[0.0, 0.5, 0.5]]))
    array([0.5])
    """
    distance_L: npt.NDArray[np.float64] = np.abs(usage_LE - other_LE).sum(axis=-1) / 2
    return distance_L


def _batches(data: Dataset, size: int) -> Iterator[dict[str, Tensor]]:
    for feeds in data.batches(size):
        yield {name: torch.from_numpy(array) for name, array in feeds.items()}
