"""Step 3.7: experts that clamp what their gate's activation gives, and up, where a layer has a limit."""

from typing import Any

from torch import Tensor

from models.moe_block import StackedExperts


class Step3p7StackedExperts(StackedExperts):
    """Experts with a limit."""

    def __init__(self, experts: Any) -> None:
        super().__init__(experts.gate_up_proj, experts.down_proj, experts.act_fn)
        self.limit: float = experts.limit

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        clamped: Tensor = self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)
        return clamped


def adapt(experts: Any) -> StackedExperts:
    """Without a limit they are as all others."""
    if experts.limit == float("inf"):
        return StackedExperts(experts.gate_up_proj, experts.down_proj, experts.act_fn)
    return Step3p7StackedExperts(experts)
