"""Recover behind full routers, as https://arxiv.org/abs/2405.16646 does: what a plan drops gives nothing meanwhile.

No checkpoint has fewer experts than its router has rows, so all experts stay in the one that is written; those that are
dropped are as they were. The graph loses them: `moe-edge optimize` with the plan.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.moe_layers import find_moe_layers, require_token_choice
from moe_spec.errors import UserError
from moe_spec.layer_plan import FULL
from moe_spec.plan import PruningPlan
from pruning.finetuning.options import FullRouter


def check_full(model: PreTrainedModel, method: FullRouter, _steps: int) -> None:
    """Refuse a plan that changes more than which experts give something.

    Raises:
        UserError: it cannot be read, its routers are not full, or experts choose their tokens.
    """
    require_token_choice(find_moe_layers(model))
    for layer in PruningPlan.load(method.plan).layers:
        if layer.router != FULL and layer.dropped:
            raise UserError(
                f"{method.plan} has the router {layer.router!r} in layer {layer.name}, behind which nothing is "
                f"trained, expected {FULL!r}",
                hint="plan with --router full; what --router rows leaves is a checkpoint: moe-edge prune CHECKPOINT "
                f"--plan {method.plan} -o pruned, and moe-edge finetune pruned",
            )


@contextlib.contextmanager
def silenced(model: PreTrainedModel, plan: PruningPlan) -> Iterator[None]:
    """Within the block the gates of what ``plan`` drops are 0, and nothing flows back to it; routers are as they were.

    Args:
        model: the one that the plan is for.
        plan: its routers stay full.
    """
    hooks = [
        layer.experts.register_forward_pre_hook(_without(layer_plan.dropped))
        for layer in find_moe_layers(model)
        if (layer_plan := plan.layer(layer.name))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without(dropped: tuple[int, ...]) -> Callable[[nn.Module, Any], tuple[Tensor, Tensor, Tensor]]:
    def hook(_experts: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden_TH, ids_TK, gates_TK = arguments
        gone_TK = torch.isin(ids_TK, torch.tensor(dropped, device=ids_TK.device))
        return hidden_TH, ids_TK, gates_TK.masked_fill(gone_TK, 0)

    return hook
