"""The most that a model may cost: as people write it, and whether layers stay within it."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

from moe_spec.errors import UserError
from moe_spec.plan import BYTES, MILLISECONDS
from pruning.budget.cost import Costs
from pruning.budget.ranked import RankedLayer

UNITS: Mapping[str, Mapping[str, float]] = {
    BYTES: {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    MILLISECONDS: {"us": 1e-3, "ms": 1, "s": 1e3},
}
"""How people write an amount, and how many of the unit that is."""

FLAGS: Mapping[str, str] = {BYTES: "--max-size", MILLISECONDS: "--max-latency"}


@dataclasses.dataclass(frozen=True)
class AtMost:
    """The most that a model may cost.

    Attributes:
        unit: ``BYTES`` or ``MILLISECONDS``.
        amount: of that unit; or the share of what the whole model costs, above 0 and at most 1.
        is_share: which of the two.
        written: as the user put it.
    """

    unit: str
    amount: float
    is_share: bool
    written: str

    @classmethod
    def parse(cls, text: str, unit: str) -> "AtMost":
        """``--max-size`` or ``--max-latency`` as people write it: 30MB, 3ms, 60% or 0.6 of the whole model.

        Raises:
            UserError: it is none of these.

        >>> AtMost.parse("1.5KiB", BYTES).amount, AtMost.parse("60%", BYTES).limit(50)
        (1536.0, 30.0)
        """
        names = UNITS[unit]
        found = re.fullmatch(rf"(\d+\.?\d*|\.\d+)\s*(%|{'|'.join(names)}|)", text)
        if found:
            number, suffix = float(found[1]), found[2]
            if suffix in names and number > 0:
                return cls(unit, number * names[suffix], is_share=False, written=text)
            share = number / 100 if suffix == "%" else number
            if suffix not in names and 0 < share <= 1:
                return cls(unit, share, is_share=True, written=text)
        raise UserError(
            f"{FLAGS[unit]} {text} is neither an amount nor a share of what the whole model has",
            hint=f"give a number with {', '.join(names)}, or a share above 0 and at most 1, like 0.6 or 60%",
        )

    def limit(self, whole: float) -> float:
        """How much that is where the whole model costs ``whole``."""
        return self.amount * whole if self.is_share else self.amount


@dataclasses.dataclass(frozen=True)
class Limit:
    """A budget that all layers share.

    Attributes:
        costs: of every count.
        most: that they may cost in all.
        written: as the user put it.
    """

    costs: Costs
    most: float
    written: str

    def holds(self, counts: Sequence[int]) -> bool:
        """Whether layers may keep ``counts`` experts."""
        return self.costs.total(counts) <= self.most * (1 + 1e-12)

    def check(self, layers: Sequence[RankedLayer]) -> None:
        """Refuse a budget that does not even hold the fewest experts that every layer can keep.

        Raises:
            UserError: they cost more.
        """
        counts = [layer.levels()[0] for layer in layers]
        if self.holds(counts):
            return
        flag, smallest = FLAGS[self.costs.unit], self.costs.total(counts)
        shown, nearest = _SHOWN[self.costs.unit](smallest)
        raise UserError(
            f"{flag} {self.written} cannot be reached: with {min(counts)} of {layers[0].experts} experts a layer, the "
            f"fewest, it is {shown}",
            hint=f"the nearest that works: {flag} {nearest}{_instead(layers[0], counts[0])}",
        )


def _instead(layer: RankedLayer, fewest: int) -> str:
    """What would let the layer keep fewer."""
    if fewest == layer.floor > 1:
        return "; or a lower --floor"
    return "; or let K shrink: --clamp-top-k" if fewest == layer.top_k > 1 and not layer.clamp_top_k else ""


_SHOWN: Mapping[str, Callable[[float], tuple[str, str]]] = {
    BYTES: lambda amount: (f"{amount:,.0f} bytes", f"{amount:.0f}B"),
    MILLISECONDS: lambda amount: (f"{amount:.3f} ms", f"{math.ceil(amount * 1000) / 1000:.3f}ms"),
}
"""An amount for people, and as it is given on the command line."""
