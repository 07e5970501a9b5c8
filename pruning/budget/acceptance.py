"""Expected acceptance: how much of what a model says a pruned one says too.

The fitness of EvoESAP, https://arxiv.org/abs/2603.06003.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from pruning.finetuning.mask import ExpertMask
from pruning.inputs import valid_tokens

MAX_BYTES = 4 << 30
"""Of what the whole model says: tokens, or examples, times width of the logits times 4."""

Batches = Callable[[], Iterator[dict[str, Tensor]]]
"""The calibration data from its start, as often as it is called."""


def acceptance(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """``sum_v min(p_v, q_v)`` of each pair of distributions, (N,), from 0 to 1: how often a draw from q passes for p.

    It is what speculative decoding accepts of a token that is drawn from q, on average.

    >>> acceptance(torch.tensor([[0.7, 0.3]]), torch.tensor([[0.5, 0.5]]))
    tensor([0.8000])
    """
    return torch.minimum(p_NV, q_NV).sum(dim=-1)


class Acceptance:
    """The mean acceptance of a model without some experts, over the next token of every token, or over classes.

    Tokens are those of the data, whatever the model would have said before (teacher forcing); padding does not count.
    Dropped experts are masked in the one model that is loaded. What the whole model says is kept in float32.
    """

    def __init__(self, model: PreTrainedModel, batches: Batches) -> None:
        """Ask the whole model.

        Raises:
            UserError: what it says is more than `MAX_BYTES`.
        """
        self._model, self._batches = model, batches
        self._whole: list[Tensor] = []
        size = 0
        for said_NV in self._said():
            self._whole.append(said_NV)
            size += said_NV.nbytes
            if size > MAX_BYTES:
                raise UserError(
                    f"the first {len(self._whole)} batches have distributions of {size:,} bytes, which a search keeps, "
                    f"at most {MAX_BYTES:,}",
                    hint="look at fewer examples: --limit",
                )

    def __call__(self, layers: Sequence[LayerPlan]) -> float:
        """From 0 to 1, if the model keeps the experts, and has the K, that ``layers`` say."""
        mask = ExpertMask(self._model)
        for layer in layers:
            mask.keep(layer.name, layer.keep, layer.top_k)
        accepted, count = 0.0, 0
        with mask.applied():
            for p_NV, q_NV in zip(self._whole, self._said(), strict=True):
                accepted += float(acceptance(p_NV, q_NV).double().sum())
                count += len(p_NV)
        return accepted / max(count, 1)

    def _said(self) -> Iterator[Tensor]:
        """Distributions (N, V) of each batch."""
        uncached = {"use_cache": False} if hasattr(self._model.config, "use_cache") else {}
        for batch in self._batches():
            with torch.no_grad():
                logits: Tensor = self._model(**batch, **uncached).logits
            yield _counted(logits, batch).float().softmax(dim=-1)


def _counted(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """(N, V) of classes, or of the tokens (B, S, V) that are no padding."""
    if logits.dim() == 2:
        return logits
    valid_T = valid_tokens(batch)
    logits_TV = logits.flatten(0, 1)
    return logits_TV if valid_T is None else logits_TV[valid_T]
