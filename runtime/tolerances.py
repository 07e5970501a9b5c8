"""How far a candidate may be from its reference: one table.

Element tolerances are the usual ones of each format (PyTorch and TransformerEngine test bf16 at 1.6e-2). A flip is a
token that selects other experts; rounding causes flips where two experts score almost the same, so a flip is excused
where the reference's margin is within ten times the element tolerance. Measured: fp16 flips 1.7 %, bf16 13 % of tokens.
"""

import dataclasses
from collections.abc import Iterable

from moe_spec.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What is allowed.

    Attributes:
        element: largest difference of an output over its largest magnitude, on examples without flips.
        margin: largest relative margin of the reference at which a flip is excused.
        flips: share of a layer's tokens that may flip.
    """

    element: float
    margin: float
    flips: float


TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(element=1e-5, margin=1e-4, flips=0.01),
    "float16": Tolerance(element=2e-3, margin=2e-2, flips=0.05),
    "bfloat16": Tolerance(element=1.6e-2, margin=1.6e-1, flips=0.20),
}
"""By number format, the finest first."""


def coarsest(float_types: Iterable[str]) -> str:
    """The format of ``TOLERANCES`` that decides when these are mixed.

    >>> coarsest({"float16", "float32"})
    'float16'

    Raises:
        UserError: there is a format for which no tolerance can be told beforehand.
    """
    found = set(float_types) - {"float64"}
    unknown = sorted(found - set(TOLERANCES))
    if unknown:
        raise UserError(
            f"there is no element tolerance for {', '.join(unknown)}",
            hint="choose the format to judge by: --precision float32, float16 or bfloat16",
        )
    return max(found or {"float32"}, key=list(TOLERANCES).index)


def tolerance_of(precision: str) -> Tolerance:
    """The row of ``TOLERANCES``.

    Raises:
        UserError: there is none for ``precision``.
    """
    if precision not in TOLERANCES:
        raise UserError(f"unknown precision {precision!r}", hint=did_you_mean(precision, TOLERANCES))
    return TOLERANCES[precision]
