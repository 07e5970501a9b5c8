"""What the forms of an MoE layer share: the FFN of an expert, and gates spread over all experts."""

import dataclasses

from benchmarks.masked.constants import SWIGLU
from benchmarks.masked.routers import ZERO_GATES

_SPREAD = """
    ids_column = Unsqueeze(ids, ints_2)
    hit = Equal(ids_column, ints_0_1_2_3_4_5_6_7)
    hit_number = Cast<to = 1>(hit)
    gates_column = Unsqueeze(gates, ints_2)
    hit_gate = Mul(hit_number, gates_column)
    {gates} = ReduceSum<keepdims = 0>(hit_gate, ints_1)"""

FUSED_SWIGLU = """
    gate, up = Split<axis = 1, num_outputs = 2>(projected)
    sigmoid = Sigmoid(gate)
    silu = Mul(gate, sigmoid)
    middle = Mul(silu, up)"""
"""From a projection (rows, 2 F) that gives gate and up in one."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One MoE layer.

    Attributes:
        mask: what keeps some experts out of reach, a key of ``ROUTERS``.
        ffn: ``swiglu`` or ``relu``.
    """

    mask: str
    ffn: str

    @property
    def parts(self) -> tuple[str, ...]:
        """The weights of an expert."""
        return ("gate", "up", "down") if self.ffn == SWIGLU else ("up", "down")

    def middle(self, x: str, suffix: str, tag: str = "") -> str:
        """Lines from ``x`` to ``middle{tag}``, which the down projection reads, by the weights ``up_{suffix}``, ..."""
        if self.ffn != SWIGLU:
            return f"""
    up{tag} = MatMul({x}, up_{suffix})
    middle{tag} = Relu(up{tag})"""
        return f"""
    gate{tag} = MatMul({x}, gate_{suffix})
    sigmoid{tag} = Sigmoid(gate{tag})
    silu{tag} = Mul(gate{tag}, sigmoid{tag})
    up{tag} = MatMul({x}, up_{suffix})
    middle{tag} = Mul(silu{tag}, up{tag})"""

    def expert(self, expert: int, x: str) -> str:
        """Lines from ``x`` (rows, H) to ``y_of_{expert}``."""
        return f"""{self.middle(x, str(expert), f"_of_{expert}")}
    y_of_{expert} = MatMul(middle_of_{expert}, down_{expert})"""

    def spread_gates(self) -> str:
        """Lines from ``ids`` and ``gates`` to ``gates_TE``, 0 where an expert was not selected."""
        if self.mask != ZERO_GATES:
            return _SPREAD.format(gates="gates_TE")
        return _SPREAD.format(gates="spread") + "\n    gates_TE = Mul(spread, one_if_kept)"
