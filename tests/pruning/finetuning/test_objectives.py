"""Entropy and distance, on the worked numbers and against their definitions."""

import math

import pytest
import torch

from pruning.collect import SCORES
from pruning.finetuning.objectives import distance, entropy, mean_entropy

LAYER_A = [[0.50, 0.45, 0.05], [0.50, 0.45, 0.05], [0.10, 0.10, 0.80]]


def test_the_worked_entropies():
    entropies = entropy(torch.tensor(LAYER_A).log())
    torch.testing.assert_close(entropies, torch.tensor([0.8557, 0.8557, 0.6390]), rtol=0, atol=5e-5)
    assert mean_entropy([torch.tensor(LAYER_A).log()]).item() == pytest.approx(0.7835, abs=5e-5)
    assert entropy(torch.zeros(1, 2)).item() == pytest.approx(0.6931, abs=5e-5)
    assert entropy(torch.tensor([[0.9, 0.1]]).log()).item() == pytest.approx(0.3251, abs=5e-5)


def test_layers_count_alike_however_many_tokens_they_have():
    layers = [torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]]).repeat(7, 1)]
    assert mean_entropy(layers).item() == pytest.approx(math.log(2) / 2)


def test_dropped_experts_have_no_part_and_no_gradient():
    logits_TE = torch.tensor([[0.3, -torch.inf, -0.2]], requires_grad=True)
    fewer_TE = torch.tensor([[0.3, -0.2]], requires_grad=True)
    for each in (logits_TE, fewer_TE):
        entropy(each).sum().backward()
    torch.testing.assert_close(entropy(logits_TE), entropy(fewer_TE))
    assert logits_TE.grad is not None
    torch.testing.assert_close(logits_TE.grad[:, [0, 2]], fewer_TE.grad)
    assert logits_TE.grad[0, 1] == 0


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_scores_are_divided_by_their_sum(score):
    logits_TE = torch.tensor([[2.0, -1.0, 0.5]])
    p_TE = SCORES[score](logits_TE) / SCORES[score](logits_TE).sum()
    expected = -(p_TE * p_TE.log()).sum(dim=-1)
    torch.testing.assert_close(entropy(logits_TE, score), expected)
    assert (entropy(logits_TE) - expected).abs() > 0.05


@pytest.mark.parametrize("score", SCORES)
def test_logits_that_leave_nothing_of_a_score_have_a_gradient(score):
    logits_TE = torch.tensor([[2.0, -300.0]], requires_grad=True)
    entropy(logits_TE, score).sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.isfinite().all()


def test_the_distance_is_kl_from_the_teacher_times_the_squared_temperature():
    teacher, student = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    p, q = (logits.div(2).softmax(-1) for logits in (teacher, student))
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distance(teacher, student, 2.0), expected)
    assert distance(teacher, teacher, 1.0).item() == pytest.approx(0, abs=1e-6)
