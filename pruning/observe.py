"""See what routers and experts really do: routers by their answer, experts through transformers' experts interface."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from models.moe_layers import MoELayer, find_moe_layers

IMPLEMENTATION = "moe_edge_observe"


class Seen(NamedTuple):
    """What one MoE layer did in one forward pass; padding is not told from other tokens here.

    Attributes:
        logits_TE: the router's logits as they come from its weights, its bias included.
        hidden_TH: what the experts read.
        ids_TK: the experts that were selected.
        gates_TK: the weights that multiply the experts' outputs in the model.
        outputs_TKH: those outputs before they are multiplied.
        mixed_TH: their weighted sum, which the routed experts give. Shared experts have no part in it.
    """

    logits_TE: Tensor
    hidden_TH: Tensor
    ids_TK: Tensor
    gates_TK: Tensor
    outputs_TKH: Tensor
    mixed_TH: Tensor

    def of(self, tokens_N: Tensor) -> "Seen":
        """The same of some tokens."""
        return Seen(*(values[tokens_N] for values in self))


Observer = Callable[[MoELayer, Seen], None]
"""Called once a layer and forward pass."""


@contextlib.contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Within the block ``observer`` sees every MoE layer of ``model`` at work. What the model computes stays the same.

    Only experts that a token is routed to are run.

    Raises:
        UserError: the model is of no known family, or has no MoE layer.
    """
    layers = {layer.experts: layer for layer in find_moe_layers(model)}
    answers: dict[nn.Module, Tensor] = {}

    def experts_function(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        outputs_TKH = expert_outputs(experts, hidden_TH, ids_TK)
        mixed_TH = (outputs_TKH * gates_TK[..., None]).sum(dim=1).to(hidden_TH.dtype)
        observer(layers[experts], Seen(answers.pop(experts), hidden_TH, ids_TK, gates_TK, outputs_TKH, mixed_TH))
        return mixed_TH

    def router_answered(experts: nn.Module, _router: nn.Module, _inputs: Any, answer: tuple[Tensor, ...]) -> None:
        answers[experts] = answer[0]  # transformers' routers and ours: logits, weights, ids

    functions: MutableMapping[str, Any] = ALL_EXPERTS_FUNCTIONS
    before = model.get_experts_implementation()
    functions[IMPLEMENTATION] = experts_function
    with contextlib.ExitStack() as stack:
        stack.callback(functions.pop, IMPLEMENTATION)
        stack.callback(model.set_experts_implementation, before)
        for layer in layers.values():
            hook = functools.partial(router_answered, layer.experts)
            stack.enter_context(layer.router.register_forward_hook(hook))
        model.set_experts_implementation(IMPLEMENTATION)
        yield


def expert_outputs(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor) -> Tensor:
    """``f_e(x_t)`` of each selected expert, (T, K, H), biases included and no weight applied.

    Every (token, expert) pair is one row with weight 1 for the family's own eager code, so layouts, gating,
    clamps and biases are the family's, not a copy of them.
    """
    top_k = ids_TK.shape[1]
    rows_SH = hidden_TH.repeat_interleave(top_k, dim=0)
    ones_S1 = torch.ones(len(rows_SH), 1, dtype=hidden_TH.dtype, device=hidden_TH.device)
    eager = inspect.unwrap(type(experts).forward)
    outputs_SH: Tensor = eager(experts, rows_SH, ids_TK.reshape(-1, 1), ones_S1)
    return outputs_SH.reshape(-1, top_k, outputs_SH.shape[-1])
