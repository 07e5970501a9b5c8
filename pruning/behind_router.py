"""Behind a router that stays as it is: experts go, and rows of the router lead to none, or to a mean output."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.moe_layers import MoELayer
from moe_spec.layer_plan import LayerPlan

Chosen = tuple[Tensor, Tensor, Tensor]
"""What experts are called with: hidden states (T, H), ids (T, K), gates (T, K)."""


class _Replaced:
    """Adds ``gate_e mean_e`` for every row e that leads to a mean output instead of an expert.

    The means are no parameters: they are neither trained nor saved. MoNE, https://arxiv.org/abs/2507.00390.
    """

    def __init__(self, rows: Sequence[int], means_DH: Tensor) -> None:
        self._rows_D, self._means_DH = torch.tensor(rows), means_DH
        self._added_TH: list[Tensor] = []

    def before(self, _experts: nn.Module, chosen: Chosen) -> None:
        _, ids_TK, gates_TK = chosen
        hit_TKD = ids_TK[..., None] == self._rows_D.to(ids_TK.device)
        gates_TD = (hit_TKD * gates_TK[..., None].float()).sum(dim=1)
        self._added_TH.append(gates_TD @ self._means_DH.to(gates_TD.device))

    def after(self, _experts: nn.Module, _chosen: Chosen, mixed_TH: Tensor) -> Tensor:
        return mixed_TH + self._added_TH.pop().to(mixed_TH.dtype)


class _Led:
    """Turns rows of the router into ids of the experts that are left; the gate of a row that leads to none is 0."""

    def __init__(self, keep: Sequence[int], rows: int) -> None:
        self._expert_of, self._leads = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)
        self._expert_of[list(keep)] = torch.arange(len(keep))
        self._leads[list(keep)] = 1

    def __call__(self, _experts: nn.Module, chosen: Chosen) -> Chosen:
        hidden_TH, ids_TK, gates_TK = chosen
        rows = ids_TK.reshape(-1)
        expert_of, leads = (
            table.to(rows.device).index_select(0, rows).view_as(ids_TK) for table in (self._expert_of, self._leads)
        )
        return hidden_TH, expert_of, gates_TK * leads.to(gates_TK.dtype)


def lead_to(layer: MoELayer, plan: LayerPlan) -> None:
    """Let the router of ``layer``, which has a row for each of ``plan.experts``, lead to those in ``plan.keep`` only.

    The experts' weights have been cut to these. Whoever runs the experts sees their new ids.
    """
    if plan.means_DH is not None:
        replaced = _Replaced(plan.dropped, torch.from_numpy(plan.mean_outputs(layer.hidden_size)))
        layer.experts.register_forward_pre_hook(replaced.before)
        layer.experts.register_forward_hook(replaced.after)
    layer.experts.register_forward_pre_hook(_Led(plan.keep, plan.experts))


def is_led(layer: MoELayer) -> bool:
    """Whether rows of the layer's router lead to no expert, because `lead_to` was called for it."""
    return any(isinstance(hook, _Led) for hook in layer.experts._forward_pre_hooks.values())
