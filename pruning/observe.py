"""See what routers and experts really do, through transformers' experts interface."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "moe_edge_observe"

Observer = Callable[[nn.Module, Tensor, Tensor, Tensor], None]
"""Called once a layer and forward pass with the experts module, expert ids (T, K), the weights (T, K) that multiply
the experts' outputs in the model, and those outputs (T, K, H) before they are multiplied."""


@contextlib.contextmanager
def observed(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Within the block ``observer`` sees every MoE layer of ``model`` at work. What the model computes stays the same.

    Only experts that a token is routed to are run.
    """

    def experts_function(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        outputs_TKH = expert_outputs(experts, hidden_TH, ids_TK)
        observer(experts, ids_TK, gates_TK, outputs_TKH)
        return (outputs_TKH * gates_TK[..., None]).sum(dim=1).to(hidden_TH.dtype)

    functions: MutableMapping[str, Any] = ALL_EXPERTS_FUNCTIONS
    before = model.get_experts_implementation()
    functions[IMPLEMENTATION] = experts_function
    try:
        model.set_experts_implementation(IMPLEMENTATION)
        yield
    finally:
        model.set_experts_implementation(before)
        del functions[IMPLEMENTATION]


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
