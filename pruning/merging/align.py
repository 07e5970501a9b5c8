"""Align neurons: the order in which the neurons of one expert come nearest to those of another.

The order of an expert's F neurons means nothing: permuting them in every weight leaves what it computes as it is. Two
experts can be averaged neuron by neuron once they agree on an order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
"""The parameters of one expert, by name: those of the experts module without their first axis."""


def neurons_first(experts: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Views of those of ``weights`` that have neurons, with the F neurons on axis 0.

    Where gate and up are fused, both halves of a neuron are in its row, be they interleaved or one after the other.
    How they lie is said by the experts module itself: https://huggingface.co/docs/transformers/experts_interface.
    """
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    axes = {up: 1 if experts.is_transposed else 0, f"{up}_bias": 0, "down_proj": 0 if experts.is_transposed else 1}
    views = {name: weights[name].movedim(axis, 0) for name, axis in axes.items() if name in weights}
    for name in views.keys() & {up, f"{up}_bias"} if experts.has_gate else ():
        axis, halves = (0, (2, -1)) if experts.is_concatenated else (1, (-1, 2))
        views[name] = views[name].view(*halves, *views[name].shape[1:]).movedim(axis, 1)
    return views


def agreement(experts: nn.Module, reference: Weights, other: Weights) -> Tensor:
    """Inner product of every neuron of ``reference`` with every neuron of ``other``, float64 (F, F).

    A neuron is all that goes into it and all that comes out: ``<Win_J, P Win_y> + <Wout_J, Wout_y P^T>`` is the sum
    of these over the pairs that the permutation P makes. The bias of a neuron counts as a weight of it.
    """
    reference_FD, other_FD = (
        torch.cat([view.double().reshape(len(view), -1) for view in neurons_first(experts, weights).values()], dim=1)
        for weights in (reference, other)
    )
    return reference_FD @ other_FD.T


def aligned(experts: nn.Module, reference: Weights, other: Weights) -> dict[str, Tensor]:
    """``other`` with its neurons permuted to agree most with those of ``reference``; it computes what it did.

    The best of all permutations, by linear assignment: O(F^3) time, seconds for F = 2048, and F^2 float64 of memory.
    Weights on the meta device have no values to be aligned by, and stay as they are.
    """
    from scipy.optimize import linear_sum_assignment  # takes a while to import

    agreement_FF = agreement(experts, reference, other)
    if agreement_FF.is_meta:
        return dict(other)
    _, order = linear_sum_assignment(agreement_FF.cpu().numpy(), maximize=True)
    order_F = torch.from_numpy(order).to(agreement_FF.device)
    permuted = {name: weight.clone() for name, weight in other.items()}
    for name, view in neurons_first(experts, permuted).items():
        view.copy_(neurons_first(experts, other)[name][order_F])
    return permuted
