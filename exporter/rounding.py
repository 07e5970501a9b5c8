"""What rounding alone does to a model: deep trained ones magnify it beyond any fixed tolerance."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from exporter.tasks import Task
from exporter.trace import run_torch
from moe_spec.runner import Arrays, Feeds


def run_in_double(model: PreTrainedModel, task: Task, feeds: Feeds) -> Arrays:
    """The outputs of ``model`` in float64, in which it is not any more afterwards."""
    with _in_double(model):
        return run_torch(model, task, {name: _double(array) for name, array in feeds.items()})


@contextlib.contextmanager
def _in_double(model: PreTrainedModel) -> Iterator[None]:
    """In place, and so without a second copy of the weights; float32 survives the way there and back to the bit."""
    dtypes = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    model.double()
    try:
        yield
    finally:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data = tensor.data.to(dtypes[name])


def _double(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(np.float64) if array.dtype == np.float32 else array
