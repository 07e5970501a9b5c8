"""Collect: what routers and experts do on batches of model inputs, as sums."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.moe_layers import MoELayer, find_moe_layers
from moe_spec.statistics import LayerStatistics
from pruning.observe import observed


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
