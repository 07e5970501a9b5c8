"""Make experts unselectable while a model trains, without changing the shape of a weight.

A dropped expert has a logit of -inf before softmax and top-k, so the model computes what it would without that
expert, and nothing flows back to it. Never by multiplication: a negative logit times a large negative number wins.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from models.moe_layers import MoELayer, find_moe_layers, set_top_k

UNSELECTABLE = -1e30
"""For a selection bias, where -inf will not do: a sigmoid of -inf is 0, and 0 plus a bias can win; and two of -inf make
NaN of a group's score."""

_SELECTION_BIAS = "e_score_correction_bias"


class ExpertMask:
    """The experts of each layer that can still be selected.

    Attributes:
        alive: their ids by the layer's name, ascending.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = {layer.name: layer for layer in find_moe_layers(model)}
        self._dropped = {name: torch.zeros(layer.num_experts, dtype=torch.bool) for name, layer in self._layers.items()}
        self._model = model
        self.alive = {name: tuple(range(layer.num_experts)) for name, layer in self._layers.items()}

    def keep(self, name: str, experts: Collection[int], top_k: int | None = None) -> None:
        """From now on only ``experts`` of layer ``name`` can be selected; K is ``top_k``, or at most their number."""
        layer = self._layers[name]
        self.alive[name] = tuple(sorted(experts))
        dropped_E = torch.ones(layer.num_experts, dtype=torch.bool)
        dropped_E[list(experts)] = False
        self._dropped[name] = dropped_E
        set_top_k(self._model, layer, min(layer.top_k, len(experts)) if top_k is None else top_k)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The mask holds within the block; afterwards routers are as they were, K included."""
        for layer in self._layers.values():
            # an attribute of the instance: Module.__call__ takes it instead of the method
            layer.router.forward = functools.partial(self._route, layer, layer.router.forward)
        try:
            yield
        finally:
            for layer in self._layers.values():
                del layer.router.forward
                set_top_k(self._model, layer, layer.top_k)

    def _route(self, layer: MoELayer, forward: Callable[..., Any], hidden: Tensor, *biases: Tensor | None) -> Any:
        """``biases`` are for the selection: some blocks hold them, and give them to their router."""
        dropped_E = self._dropped[layer.name].to(hidden.device)
        masked = [bias if bias is None else bias.masked_fill(dropped_E, UNSELECTABLE) for bias in biases]
        with _MaskedLinear(dropped_E), _unselectable(layer.router, dropped_E):
            return forward(hidden, *masked)


class _MaskedLinear(TorchFunctionMode):
    """What ``F.linear`` gives is a router's logits: -inf for the dropped experts."""

    def __init__(self, dropped_E: Tensor) -> None:
        super().__init__()
        self._dropped_E = dropped_E

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.masked_fill(self._dropped_E, -torch.inf) if func is nn.functional.linear else result


@contextlib.contextmanager
def _unselectable(router: nn.Module, dropped_E: Tensor) -> Iterator[None]:
    """Whatever part of ``router`` holds a selection bias, as a parameter or a buffer, holds a masked one."""
    owners: list[Any] = [owner for module in router.modules() for owner in (module._parameters, module._buffers)]
    biases = [(owner, owner[_SELECTION_BIAS]) for owner in owners if owner.get(_SELECTION_BIAS) is not None]
    for owner, bias in biases:
        owner[_SELECTION_BIAS] = bias.masked_fill(dropped_E, UNSELECTABLE)
    try:
        yield
    finally:
        for owner, bias in biases:
            owner[_SELECTION_BIAS] = bias
