"""How many experts a layer is to keep, as people write it."""

import math

from moe_spec.errors import UserError

Keep = int | float
"""An int is how many experts a layer keeps; a float is the share of them that it keeps, above 0 and at most 1."""


def parse_keep(text: str) -> Keep:
    """``--keep`` as people write it: a whole number is a count, anything with a point or a percent sign a share.

    Raises:
        UserError: neither a count from 1 nor a share above 0 and at most 1.

    >>> parse_keep("3"), parse_keep("0.5"), parse_keep("50%"), parse_keep("1"), parse_keep("1.0")
    (3, 0.5, 0.5, 1, 1.0)
    """
    keep: Keep
    try:
        if text.isdecimal():
            keep = int(text)
        elif text.endswith("%"):
            keep = float(text[:-1]) / 100
        else:
            keep = float(text)
    except ValueError:
        keep = math.nan
    return check_budget(keep, text)


def check_budget(keep: Keep, written: str) -> Keep:
    """``keep`` if it is a count from 1 or a share above 0 and at most 1; ``written`` is how the user put it.

    Raises:
        UserError: it is neither.
    """
    if keep >= 1 if isinstance(keep, int) else 0 < keep <= 1:
        return keep
    raise UserError(
        f"--keep {written} is neither a count of experts nor a share of them",
        hint="give a whole number from 1, like --keep 4, or a share above 0 and at most 1, like --keep 0.5 or 50%",
    )
