"""What is minimised: the task's loss, the entropy of routers, the distance from a teacher."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.finetuning.examples import Inputs

Objective = Callable[[nn.Module, Inputs], Tensor]
"""The loss, a scalar with a graph, of a batch."""


def task_loss(model: nn.Module, batch: Inputs) -> Tensor:
    """Cross-entropy of classes or next tokens, as the model's own class computes it from ``labels``."""
    loss: Tensor = model(**batch).loss
    return loss


def entropy(logits_TE: Tensor, *, sigmoid: bool = False) -> Tensor:
    """``H(p) = - sum_e p_e ln p_e`` of each token, (T,), over the experts whose logit is not -inf.

    Args:
        logits_TE: (T, E) float.
        sigmoid: ``p`` is the sigmoids of the logits divided by their sum, instead of their softmax.

    >>> entropy(torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]]).log())
    tensor([0.6931, 0.3251])
    """
    logits_TE = logits_TE.float()
    log_p_TE = functional.log_softmax(functional.logsigmoid(logits_TE) if sigmoid else logits_TE, dim=-1)
    finite_TE = log_p_TE.masked_fill(log_p_TE == -torch.inf, 0.0)  # 0 x -inf is NaN, and so is its gradient
    return -(log_p_TE.exp() * finite_TE).sum(dim=-1)


def mean_entropy(logits: Iterable[Tensor], *, sigmoid: bool = False) -> Tensor:
    """Mean of `entropy` over layers and tokens; ``logits`` has (T, E) of each layer."""
    return torch.stack([entropy(logits_TE, sigmoid=sigmoid).mean() for logits_TE in logits]).mean()


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
