"""See what routers and experts really do: routers by their answer, experts through transformers' experts interface."""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from models.families import Family, family_of
from models.moe_layers import MoELayer, find_moe_layers, require_token_choice

IMPLEMENTATION = "moe_edge_observe"

_TINY = torch.finfo(torch.float32).tiny

_SLOTS = 1024
"""A call of the family's code costs as much as some hundred tokens; experts with fewer share one."""


class Run(NamedTuple):
    """One expert at work on the N tokens that selected it.

    Attributes:
        expert: its id.
        tokens_N: which of the T tokens they are.
        gates_N: the weights that multiply its outputs in the model.
        outputs_NH: those outputs before they are multiplied; where gates multiply what experts read, what the model
            adds divided by the gates.
    """

    expert: int
    tokens_N: Tensor
    gates_N: Tensor
    outputs_NH: Tensor

    def of(self, valid_N: Tensor) -> "Run":
        """The same on the tokens for which the mask holds."""
        return Run(self.expert, self.tokens_N[valid_N], self.gates_N[valid_N], self.outputs_NH[valid_N])


class Seen(NamedTuple):
    """What one MoE layer did in one forward pass; padding is not told from other tokens here.

    Attributes:
        logits_TE: the router's logits as they come from its weights, its bias included.
        hidden_TH: what the experts read.
        mixed_TH: the weighted sum of their outputs. Shared experts have no part in it.
        runs: each expert that a token selected, in order.
    """

    logits_TE: Tensor
    hidden_TH: Tensor
    mixed_TH: Tensor
    runs: tuple[Run, ...]


Observer = Callable[[MoELayer, Seen], None]
"""Called once a layer and forward pass."""


@contextlib.contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Within the block ``observer`` sees every MoE layer of ``model`` at work. What the model computes stays the same.

    Only experts that a token is routed to are run.

    Raises:
        UserError: the model is of no known family, has no MoE layer, or one whose experts choose their tokens.
    """
    layers = {layer.experts: layer for layer in find_moe_layers(model)}
    require_token_choice(layers.values())
    row = family_of(model.config)
    answers: dict[nn.Module, Tensor] = {}

    def experts_function(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        runs = tuple(_runs(experts, hidden_TH, ids_TK, gates_TK))
        mixed_TH = torch.zeros_like(hidden_TH)
        for run in runs:
            gated_NH = run.outputs_NH * run.gates_N[:, None]
            mixed_TH.index_add_(0, run.tokens_N, gated_NH.to(mixed_TH.dtype))
        observer(layers[experts], Seen(answers.pop(experts), hidden_TH, mixed_TH, runs))
        return mixed_TH

    def router_answered(experts: nn.Module, _router: nn.Module, _inputs: Any, answer: tuple[Tensor, ...]) -> None:
        answers[experts] = logits_of(row, answer[0])  # transformers' routers and ours: logits, weights, ids

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


def logits_of(row: Family, answer_TE: Tensor) -> Tensor:
    """The logits in a router's first answer; of probabilities p their logarithms, for the softmax of log p is p."""
    return answer_TE if row.answers == "logits" else answer_TE.clamp(min=_TINY).log()


def _runs(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Iterator[Run]:
    """The experts that a token selected, one after the other; small ones are computed together."""
    ids_S, order_S = ids_TK.flatten().sort(stable=True)
    tokens_S, gates_S = order_S // ids_TK.shape[1], gates_TK.flatten()[order_S]
    selected, counts = torch.unique_consecutive(ids_S, return_counts=True)
    ends = counts.cumsum(0)
    each = zip(selected.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)
    for _, together in itertools.groupby(each, key=lambda expert: expert[1] // _SLOTS):
        part = list(together)
        start, end = part[0][1], part[-1][2]
        x_SH, gates_S1 = hidden_TH[tokens_S[start:end]], gates_S[start:end, None]
        if getattr(experts, "gates_input", False):  # f(g x) is what the model adds: g times a g-th of it
            outputs_SH = _outputs(experts, x_SH * gates_S1, ids_S[start:end]) / gates_S1.clamp(min=_TINY)
        else:
            outputs_SH = _outputs(experts, x_SH, ids_S[start:end])
        for expert, first, last in part:
            yield Run(expert, tokens_S[first:last], gates_S[first:last], outputs_SH[first - start : last - start])


def expert_outputs(experts: nn.Module, expert: int, hidden_NH: Tensor) -> Tensor:
    """``f_e(x)`` of one expert, (N, H), biases included and no weight applied."""
    return _outputs(experts, hidden_NH, torch.full((len(hidden_NH),), expert, device=hidden_NH.device))


def _outputs(experts: nn.Module, hidden_SH: Tensor, ids_S: Tensor) -> Tensor:
    """``f_e(x)`` of one expert for each x, (S, H).

    It is the only one that the family's own eager code is told of, with weight 1, so layouts, gating, clamps and
    biases are the family's, not a copy of them.
    """
    eager = inspect.unwrap(type(experts).forward)
    outputs_SH: Tensor = eager(experts, hidden_SH, ids_S[:, None], torch.ones_like(hidden_SH[:, :1]))
    return outputs_SH


def outputs_of_all(layer: MoELayer, hidden_NH: Tensor) -> Tensor:
    """``f_e(x)`` of every expert on every token, (E, N, H)."""
    return torch.stack([expert_outputs(layer.experts, expert, hidden_NH) for expert in range(layer.num_experts)])
