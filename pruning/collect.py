"""Collect: what routers and experts do on batches of model inputs, as sums."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from models.families import Score
from models.moe_layers import MoELayer, find_moe_layers
from moe_spec.statistics import KEYS, LayerStatistics
from pruning.observe import Seen, expert_outputs, observed

SCORES: Mapping[Score, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
}

_BLOCK, _DENSE_BLOCK = 2**18, 2**24
"""Elements of the experts' outputs that are added at a time: 2 MiB in float64 stay in a cache, 128 MiB in memory."""


def collect(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, dense: bool = False
) -> tuple[LayerStatistics, ...]:
    """The sums of every MoE layer over ``batches`` of model inputs, in one forward pass each.

    Tokens whose ``attention_mask`` is 0 are not counted. Logits, ids and weights are the ones that the router really
    gave, and outputs those of the experts that it selected.

    Args:
        model: in eval mode.
        batches: what the model takes.
        dense: gather the dense statistics too. For them every expert runs on every token.

    Raises:
        UserError: the model is of no known family, or has no MoE layer.
    """
    sums = {layer.name: LayerSums(layer, dense) for layer in find_moe_layers(model)}
    valid_T: Tensor | None = None

    def observe(layer: MoELayer, seen: Seen) -> None:
        sums[layer.name].add(seen, valid_T)

    with observed(model, observe):
        for batch in batches:
            mask_BS = batch.get("attention_mask")
            valid_T = None if mask_BS is None else mask_BS.flatten() != 0
            run_backbone(model, batch)
    return tuple(layer_sums.statistics() for layer_sums in sums.values())


def run_backbone(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """One forward pass without the head, which has no part in routing, and whose logits are the largest tensor."""
    uncached = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        model.base_model(**batch, **uncached)


class LayerSums:
    """The running sums of one layer, in float64."""

    def __init__(self, layer: MoELayer, dense: bool = False) -> None:
        self._layer = layer
        self._dense = dense
        self._token_count = 0
        sizes = {"E": layer.num_experts, "H": layer.hidden_size}
        self._sums = {
            name: torch.zeros([sizes[axis] for axis in key.axes], dtype=torch.float64)
            for name, key in KEYS.items()
            if dense or not key.dense
        }

    def add(self, seen: Seen, valid_T: Tensor | None = None) -> None:
        """Count the valid tokens of one forward pass, or all of them."""
        device = seen.ids_TK.device  # parameters do not tell it: they may wait on a disk
        self._sums = {key: total.to(device) for key, total in self._sums.items()}
        tokens_N = torch.arange(len(seen.ids_TK), device=device)
        tokens_N = tokens_N if valid_T is None else tokens_N[valid_T.to(device)]
        self._token_count += len(tokens_N)
        for some in _blocks(tokens_N, _BLOCK // seen.outputs_TKH[0].numel()):
            block = seen.of(some)
            self._add_scores(block.logits_TE.double())
            self._add_selected(block)
        if self._dense:
            for some in _blocks(tokens_N, _DENSE_BLOCK // self._sums["output"].numel()):
                self._add_dense(seen.hidden_TH[some])

    def _add_scores(self, logits_TE: Tensor) -> None:
        self._sums["probability"] += SCORES[self._layer.score](logits_TE).sum(dim=0)
        self._sums["logit_gram"].addmm_(logits_TE.T, logits_TE)

    def _add_selected(self, seen: Seen) -> None:
        """S (token, expert) pairs, each added to its expert."""
        ids_S, gate_S = seen.ids_TK.flatten(), seen.gates_TK.flatten().double()
        output_SH = seen.outputs_TKH.flatten(0, 1).double()
        squared_SH = output_SH.square()
        norm_squared_S = squared_SH.sum(dim=-1)
        norm_S = norm_squared_S.sqrt()
        gated_S = gate_S * norm_S
        change_S = _change(seen.hidden_TH.double(), seen.mixed_TH.double()).repeat_interleave(seen.ids_TK.shape[1])
        terms = {
            "tokens": torch.ones_like(gate_S),
            "gate": gate_S,
            "gate_squared": gate_S.square(),
            "output_norm": norm_S,
            "output_norm_squared": norm_squared_S,
            "gated_norm": gated_S,
            "gated_norm_squared": gated_S.square(),
            "gated_norm_change": gated_S * change_S,
            "output": output_SH,
            "output_squared": squared_SH,
        }
        for key, term in terms.items():
            self._sums[key].index_add_(0, ids_S, term)
        self._sums["output_peak"].scatter_reduce_(0, ids_S, output_SH.abs().amax(dim=-1), "amax")

    def _add_dense(self, hidden_TH: Tensor) -> None:
        layer = self._layer
        ids_TE = torch.arange(layer.num_experts, device=hidden_TH.device).expand(len(hidden_TH), -1)
        outputs_TEH = expert_outputs(layer.experts, hidden_TH, ids_TE).double()
        self._sums["output_of_all"] += outputs_TEH.sum(dim=0)
        # a sum over tokens of products over H is one product over both
        directions_EN = functional.normalize(outputs_TEH, dim=-1).transpose(0, 1).flatten(1)
        self._sums["output_cosine"].addmm_(directions_EN, directions_EN.T)

    def statistics(self) -> LayerStatistics:
        """The sums so far."""
        layer = self._layer
        return LayerStatistics(
            name=layer.name,
            experts=layer.num_experts,
            top_k=layer.top_k,
            token_count=self._token_count,
            sums={key: total.cpu().numpy() for key, total in self._sums.items()},
            groups=layer.groups,
        )


def _blocks(tokens_N: Tensor, size: int) -> tuple[Tensor, ...]:
    """The tokens in parts of ``size``, and of one token where it is less."""
    return torch.split(tokens_N, max(1, size))


def _change(before_TH: Tensor, added_TH: Tensor) -> Tensor:
    """``max(0, 1 - cos(h, h + y))`` of every token, (T,); a vector of zeros has the cosine 0 with any other."""
    return (1 - functional.cosine_similarity(before_TH, before_TH + added_TH, dim=-1)).clamp(min=0)
