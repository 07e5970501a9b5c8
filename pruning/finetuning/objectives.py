"""What is minimised: the task's loss, the entropy of routers, the distance from a teacher."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.families import Score
from pruning.finetuning.examples import Inputs

Objective = Callable[[nn.Module, Inputs], Tensor]
"""The loss, a scalar with a graph, of a batch."""

_TINY = torch.finfo(torch.float32).tiny

_LOG_SCORES: Mapping[Score, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE,
    "sigmoid": functional.logsigmoid,
    "sqrtsoftplus": lambda logits_TE: functional.softplus(logits_TE).clamp(min=_TINY).log() / 2,
}
"""Logarithms of a router's scores, up to what all experts of a token have in common."""


def task_loss(model: nn.Module, batch: Inputs) -> Tensor:
    """Cross-entropy of classes or next tokens, as the model's own class computes it from ``labels``."""
    loss: Tensor = model(**batch).loss
    return loss


def entropy(logits_TE: Tensor, score: Score = "softmax") -> Tensor:
    """``H(p) = - sum_e p_e ln p_e`` of each token, (T,), over the experts whose logit is not -inf.

    Args:
        logits_TE: (T, E) float.
        score: what the router makes of its logits; ``p`` is that divided by its sum.

    >>> entropy(torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]]).log())
    tensor([0.6931, 0.3251])
    """
    log_p_TE = functional.log_softmax(_LOG_SCORES[score](logits_TE.float()), dim=-1)
    finite_TE = log_p_TE.masked_fill(log_p_TE == -torch.inf, 0.0)  # 0 x -inf is NaN, and so is its gradient
    return -(log_p_TE.exp() * finite_TE).sum(dim=-1)


def mean_entropy(logits: Iterable[Tensor], score: Score = "softmax") -> Tensor:
    """Mean of `entropy` over layers and tokens; ``logits`` has (T, E) of each layer."""
    return torch.stack([entropy(logits_TE, score).mean() for logits_TE in logits]).mean()


def distance(teacher_NV: Tensor, student_NV: Tensor, temperature: float) -> Tensor:
    """``KL(teacher || student) * temperature ** 2``, mean over N; both are logits (N, V) float.

    >>> distance(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log(), 1.0)
    tensor(0.1438)
    """
    of_teacher_NV, of_student_NV = (
        functional.log_softmax(logits_NV.float() / temperature, dim=-1) for logits_NV in (teacher_NV, student_NV)
    )
    divergence = functional.kl_div(of_student_NV, of_teacher_NV, reduction="batchmean", log_target=True)
    return divergence * temperature**2
