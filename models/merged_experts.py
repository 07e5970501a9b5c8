"""Merged experts of a torch model: how a family's weights lie, for the arithmetic of `moe_spec.merging`."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from moe_spec.layer_plan import LayerPlan
from moe_spec.merging import Array, Merging

Weights = Mapping[str, Tensor]
"""The parameters of one expert, by name: those of the experts module without their first axis."""


class MergedExperts:
    """The parameters of the experts that a plan leaves of one layer, computed when they are asked for."""

    def __init__(self, experts: nn.Module, plan: LayerPlan, read: Callable[[str, int], Tensor]) -> None:
        """Nothing is read yet.

        Args:
            experts: says how weights lie; its own values are not looked at.
            plan: of the layer, which merges.
            read: ``read(name, expert)`` gives the parameters of the experts as they were, without their first axis.
        """

        def neurons_on_axis_0(name: str, expert: int) -> Array:
            values = read(name, expert).detach().contiguous().double().cpu()
            return neurons_first(experts, {name: values}).get(name, values).numpy()

        names = [name for name, _ in experts.named_parameters(recurse=False)]
        ordered = [name for name in _axes_of_neurons(experts) if name in names]
        self._experts, self._merging = experts, Merging(plan, ordered, neurons_on_axis_0)

    def parameter(self, name: str, survivor: int) -> Tensor:
        """Parameter ``name`` of ``survivor``, float64, without the first axis."""
        mean = torch.from_numpy(self._merging.mean(name, survivor))
        shape = self._experts.get_parameter(name).shape[1:]
        values = torch.empty(shape, dtype=torch.float64)
        neurons_first(self._experts, {name: values}).get(name, values).copy_(mean)
        return values


def neurons_first(experts: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Views of those of ``weights`` that have neurons, with the F neurons on axis 0.

    Where gate and up are fused, both halves of a neuron are in its row, be they interleaved or one after the other.
    How they lie is said by the experts module itself: https://huggingface.co/docs/transformers/experts_interface.
    """
    axes = _axes_of_neurons(experts)
    views = {name: weights[name].movedim(axis, 0) for name, axis in axes.items() if name in weights}
    for name in views.keys() - {"down_proj"} if experts.has_gate else ():
        axis, halves = (0, (2, -1)) if experts.is_concatenated else (1, (-1, 2))
        views[name] = views[name].view(*halves, *views[name].shape[1:]).movedim(axis, 1)
    return views


def _axes_of_neurons(experts: nn.Module) -> dict[str, int]:
    """The axis of the neurons, or of both their halves, in what goes into them, their biases, and what comes out."""
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    return {up: 1 if experts.is_transposed else 0, f"{up}_bias": 0, "down_proj": 0 if experts.is_transposed else 1}
