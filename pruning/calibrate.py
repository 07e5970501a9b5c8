"""Calibrate: one pass over task data, and the sums by which criteria rank experts."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.checkpoints import load_model
from models.moe_layers import MoELayer, find_moe_layers
from moe_spec.dataset import load_dataset
from moe_spec.files import refuse_existing
from moe_spec.identity import checkpoint_sha256
from moe_spec.images import ImagePreprocessor
from moe_spec.statistics import LayerStatistics, Statistics
from pruning.inputs import check_inputs
from pruning.observe import observed

Progress = Callable[[int, int], None]
"""Called with the examples done and the examples in all."""


def calibrate(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    on_progress: Progress | None = None,
) -> Statistics:
    """Run task data through a checkpoint and write statistics.safetensors.

    Args:
        checkpoint: transformers directory of a known MoE family.
        data: .npz of model inputs or of images (``moe_spec.dataset``); labels are not used.
        out: statistics to write; must not exist.
        batch_size: examples a forward pass.
        limit: use only the first so many examples.
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

    layers = collect(model, batches())
    statistics = Statistics(checkpoint_sha256(checkpoint), (dataset.sha256,), layers)
    statistics.save(out)
    return statistics


def collect(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> tuple[LayerStatistics, ...]:
    """The sums of every MoE layer over ``batches`` of model inputs.

    Tokens whose ``attention_mask`` is 0 are not counted. Ids and weights are the ones that the router really gave.
    """
    layers = find_moe_layers(model)
    sums = {layer.experts: _Sums(layer) for layer in layers}
    valid_T: Tensor | None = None

    def observe(experts: nn.Module, ids_TK: Tensor, gates_TK: Tensor, outputs_TKH: Tensor) -> None:
        everything = torch.ones(len(ids_TK), dtype=torch.bool, device=ids_TK.device)
        sums[experts].add(ids_TK, gates_TK, outputs_TKH, everything if valid_T is None else valid_T)

    backbone = model.base_model  # a head has no part in routing, and its logits would be the largest tensor
    uncached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with observed(model, observe), torch.no_grad():
        for batch in batches:
            mask_BS = batch.get("attention_mask")
            valid_T = None if mask_BS is None else mask_BS.flatten() != 0
            backbone(**batch, **uncached)
    return tuple(sums[layer.experts].statistics() for layer in layers)


_KEYS = ("tokens", "gate", "output_norm", "output_norm_squared", "gated_norm")


class _Sums:
    """The running sums of one layer, in float64."""

    def __init__(self, layer: MoELayer) -> None:
        self._layer = layer
        self._token_count = 0
        self._sums = {key: torch.zeros(layer.num_experts, dtype=torch.float64) for key in _KEYS}

    def add(self, ids_TK: Tensor, gates_TK: Tensor, outputs_TKH: Tensor, valid_T: Tensor) -> None:
        """Count the valid tokens of one forward pass."""
        ids_S = ids_TK[valid_T].flatten().cpu()
        gate_S = gates_TK[valid_T].flatten().double().cpu()
        norm_S = outputs_TKH[valid_T].double().norm(dim=-1).flatten().cpu()
        terms = {
            "tokens": torch.ones_like(gate_S),
            "gate": gate_S,
            "output_norm": norm_S,
            "output_norm_squared": norm_S.square(),
            "gated_norm": gate_S * norm_S,
        }
        for key, total_E in self._sums.items():
            total_E.index_add_(0, ids_S, terms[key])
        self._token_count += int(valid_T.sum())

    def statistics(self) -> LayerStatistics:
        """The sums so far."""
        layer = self._layer
        return LayerStatistics(
            name=layer.name,
            experts=layer.num_experts,
            top_k=layer.top_k,
            token_count=self._token_count,
            sums={key: total_E.numpy() for key, total_E in self._sums.items()},
            groups=layer.groups,
        )


def _tensor(array: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Ids and masks as int64, everything else in the model's dtype."""
    if array.dtype.kind in "biu":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
