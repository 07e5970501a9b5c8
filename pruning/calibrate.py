"""Calibrate: one pass over task data, and the statistics file by which criteria rank experts."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.checkpoints import load_model
from moe_spec.dataset import load_dataset
from moe_spec.files import refuse_existing
from moe_spec.identity import checkpoint_sha256
from moe_spec.images import ImagePreprocessor
from moe_spec.statistics import Statistics
from pruning.collect import collect
from pruning.inputs import check_inputs

Progress = Callable[[int, int], None]
"""Called with the examples done and the examples in all."""


def calibrate(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    dense: bool = False,
    on_progress: Progress | None = None,
) -> Statistics:
    """Run task data through a checkpoint and write statistics.safetensors.

    Args:
        checkpoint: transformers directory of a known MoE family.
        data: .npz of model inputs or of images (``moe_spec.dataset``); labels are not used.
        out: statistics to write; must not exist.
        batch_size: examples a forward pass.
        limit: use only the first so many examples.
        dense: take the dense statistics too, for which every expert runs on every token.
        on_progress: told after every batch.

    Raises:
        UserError: ``out`` exists, or checkpoint or data cannot be read or do not fit together.
    """
    refuse_existing(out)
    dataset = load_dataset(data, ImagePreprocessor.load(checkpoint))
    if limit is not None:
        dataset = dataset.first(limit)
    model = load_model(checkpoint)
    check_inputs(dataset.feeds, model, str(data))

    def batches() -> Iterable[Mapping[str, Tensor]]:
        for done, feeds in enumerate(dataset.batches(batch_size), start=1):
            yield {name: _tensor(array, model.dtype) for name, array in feeds.items()}
            if on_progress is not None:
                on_progress(min(done * batch_size, len(dataset)), len(dataset))

    layers = collect(model, batches(), dense=dense)
    statistics = Statistics(checkpoint_sha256(checkpoint), (dataset.sha256,), layers)
    statistics.save(out)
    return statistics


def _tensor(array: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Ids and masks as int64, everything else in the model's dtype."""
    if array.dtype.kind in "biu":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
