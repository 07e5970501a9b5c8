"""The auxiliary losses that keep a V-MoE router from using few experts: https://arxiv.org/abs/2106.05974, appendix A.

Both are squared coefficients of variation over the experts of a batch: 0 when all experts get the same.
"""

import torch
from torch import Tensor


def auxiliary_loss(logits_TE: Tensor, noisy_logits_TE: Tensor, noise_std: float, top_k: int) -> Tensor:
    """Mean of importance and load loss, as in the paper: a scalar in float32.

    Args:
        logits_TE: (T, E) float, what the router computed.
        noisy_logits_TE: (T, E) float, the same with normal noise added: what top-k saw.
        noise_std: standard deviation of that noise.
        top_k: K.
    """
    logits_TE, noisy_logits_TE = logits_TE.float(), noisy_logits_TE.float()
    return (importance_loss(logits_TE) + load_loss(logits_TE, noisy_logits_TE, noise_std, top_k)) / 2


def importance_loss(logits_TE: Tensor) -> Tensor:
    """Of the probability that each expert is given over the batch: ``Imp_e = sum_t softmax(logits_t)_e``.

    >>> importance_loss(torch.zeros(3, 4)).item()
    0.0
    """
    return _squared_variation(torch.softmax(logits_TE, dim=-1).sum(dim=0))


def load_loss(logits_TE: Tensor, noisy_logits_TE: Tensor, noise_std: float, top_k: int) -> Tensor:
    """Of the probability that each expert would be selected if only its own noise were drawn again.

    A count of selected tokens has no gradient; this smooth stand-in for it has one.
    """
    threshold_T1 = noisy_logits_TE.topk(top_k, dim=-1).values[:, -1:]
    selected_TE = torch.special.ndtr((logits_TE - threshold_T1) / noise_std)
    return _squared_variation(selected_TE.mean(dim=0))


def _squared_variation(values_E: Tensor) -> Tensor:
    return values_E.var(correction=0) / values_E.mean().square()
