"""Collect: what routers and experts do on batches of model inputs, as sums."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from models.families import Score
from models.moe_layers import MoELayer, find_moe_layers
from moe_spec.statistics import KEYS, LayerStatistics
from pruning.inputs import valid_tokens
from pruning.observe import Run, Seen, observed, outputs_of_all

SCORES: Mapping[Score, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits_TE: functional.softplus(logits_TE).sqrt(),
}

_CHANGE_TOKENS, _DENSE_ELEMENTS = 128, 2**24
"""What is held in float64 at a time: tokens before and after, so that they stay in a core's cache, and elements of all
experts' outputs, 128 MiB."""


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
    batch: Mapping[str, Tensor] = {}

    def observe(layer: MoELayer, seen: Seen) -> None:
        sums[layer.name].add(seen, valid_tokens(batch, layer.name))

    with observed(model, observe):
        for batch in batches:
            run_backbone(model, batch)
    return tuple(layer_sums.statistics() for layer_sums in sums.values())


def run_backbone(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """One forward pass without the head, which has no part in routing, and whose logits are the largest tensor."""
    uncached = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
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
        device = seen.hidden_TH.device  # parameters do not tell it: they may wait on a disk
        self._sums = {key: total.to(device) for key, total in self._sums.items()}
        everything = torch.ones(len(seen.hidden_TH), dtype=torch.bool, device=device)
        valid_T = everything if valid_T is None else valid_T.to(device)
        self._token_count += int(valid_T.sum())
        self._add_logits(seen.logits_TE[valid_T].double())
        change_T = _change(seen.hidden_TH, seen.mixed_TH)
        for run in seen.runs:
            valid_N = valid_T[run.tokens_N]
            if valid_N.all():
                self._add_run(run, change_T)
            elif valid_N.any():
                self._add_run(run.of(valid_N), change_T)
        if self._dense:
            tokens = max(1, _DENSE_ELEMENTS // self._sums["output"].numel())
            for hidden_NH in torch.split(seen.hidden_TH[valid_T], tokens):
                self._add_dense(hidden_NH)

    def _add_logits(self, logits_TE: Tensor) -> None:
        self._sums["probability"] += SCORES[self._layer.score](logits_TE).sum(dim=0)
        self._sums["logit_gram"].addmm_(logits_TE.T, logits_TE)

    def _add_run(self, run: Run, change_T: Tensor) -> None:
        gate_N, output_NH = run.gates_N.double(), run.outputs_NH.double()
        squared_NH = output_NH.square()
        norm_squared_N = squared_NH.sum(dim=-1)
        norm_N = norm_squared_N.sqrt()
        gated_N = gate_N * norm_N
        vectors = {
            "tokens": torch.ones_like(gate_N),
            "gate": gate_N,
            "gate_squared": gate_N.square(),
            "output_norm": norm_N,
            "output_norm_squared": norm_squared_N,
            "gated_norm": gated_N,
            "gated_norm_squared": gated_N.square(),
            "gated_norm_change": gated_N * change_T[run.tokens_N],
        }
        sums = dict(zip(vectors, torch.stack(tuple(vectors.values())).sum(dim=-1), strict=True))
        sums |= {"output": output_NH.sum(dim=0), "output_squared": squared_NH.sum(dim=0)}
        for key, one in sums.items():
            self._sums[key][run.expert] += one
        peak = self._sums["output_peak"][run.expert]
        peak.copy_(torch.maximum(peak, squared_NH.amax(dim=0).max().sqrt()))  # half the time of max() of all

    def _add_dense(self, hidden_NH: Tensor) -> None:
        outputs_ENH = outputs_of_all(self._layer, hidden_NH).double()
        self._sums["output_of_all"] += outputs_ENH.sum(dim=1)
        # a sum over tokens of products over H is one product over both
        directions_ES = functional.normalize(outputs_ENH, dim=-1).flatten(1)
        self._sums["output_cosine"].addmm_(directions_ES, directions_ES.T)

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


def _change(before_TH: Tensor, added_TH: Tensor) -> Tensor:
    """``max(0, 1 - cos(h, h + y))`` of every token, (T,); a vector of zeros has the cosine 0 with any other."""
    pieces = zip(*(torch.split(values_TH, _CHANGE_TOKENS) for values_TH in (before_TH, added_TH)), strict=True)
    cosines = [functional.cosine_similarity(h.double(), h.double() + y.double(), dim=-1) for h, y in pieces]
    return (1 - torch.cat(cosines)).clamp(min=0)
