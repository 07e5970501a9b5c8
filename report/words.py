"""Numbers as people read them."""

import math
from collections.abc import Sequence

NONE = "–"
"""What is not known."""
_SPACE = "\N{NO-BREAK SPACE}"
"""Between a number and its unit."""


def percent(share: float | None, digits: int = 1) -> str:
    r"""A share of 1.

    >>> percent(0.8889), percent(None)
    ('88.9\xa0%', '–')
    """
    return NONE if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}{_SPACE}%"


def points(share: float | None) -> str:
    """A difference of shares, in percentage points.

    >>> points(-0.039), points(0.0)
    ('−3.9', '±0.0')
    """
    if share is None or not math.isfinite(share):
        return NONE
    sign = "±" if round(1000 * share) == 0 else "+" if share > 0 else "−"
    return f"{sign}{abs(100 * share):.1f}"


def number(value: float | None) -> str:
    """Three digits.

    >>> number(1.774e-07), number(2.40411), number(None), number(0.0)
    ('1.77e-07', '2.4', '–', '0')
    """
    return NONE if value is None or not math.isfinite(value) else f"{value:.3g}"


def milliseconds(value: float | None) -> str:
    r"""A latency.

    >>> milliseconds(0.5512), milliseconds(12.345)
    ('0.55\xa0ms', '12.3\xa0ms')
    """
    if value is None or not math.isfinite(value):
        return NONE
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}{_SPACE}ms"


def size(count: float | None) -> str:
    r"""Bytes, in units of 1000.

    >>> size(None), size(8544), size(1_200_000_000)
    ('–', '8.54\xa0kB', '1.2\xa0GB')
    """
    if count is None:
        return NONE
    for name, unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= unit:
            return (f"{count / unit:.3g}" if count < 999.5 * unit else f"{count / unit:,.0f}") + _SPACE + name
    return f"{count:.0f} bytes"


def score(value: float) -> str:
    """What a criterion gave, short enough for a cell.

    >>> score(1537.37), score(0.122345), score(2.5e-07)
    ('1537', '0.122', '2.5e-07')
    """
    return f"{value:.0f}" if 1000 <= abs(value) < 100_000 else f"{value:.3g}"


def span(numbers: Sequence[float]) -> str:
    """The smallest and the largest, once where they are the same.

    >>> span([4, 4]), span([2, 5]), span([])
    ('4', '2–5', '–')
    """
    ends = dict.fromkeys(f"{end:g}" for end in (min(numbers), max(numbers))) if numbers else (NONE,)
    return "–".join(ends)


def short(sha256: str | None) -> str:
    """The beginning of a hash, enough to tell it from others."""
    return sha256[:12] if sha256 else NONE


def distinct(names: Sequence[str], most: int = 13) -> list[str]:
    """Dotted names that are too long for a column, without the parts that all begin or end with.

    >>> distinct(["model.layers.0.mlp", "model.layers.1.mlp"]), distinct(["layers.0.mlp", "layers.1.mlp"])
    (['0', '1'], ['layers.0.mlp', 'layers.1.mlp'])
    """
    if len(set(names)) < 2 or max(map(len, names)) <= most:
        return list(names)
    parts = [name.split(".") for name in names]
    shortest = min(map(len, parts))
    first = next((at for at in range(shortest) if len({part[at] for part in parts}) > 1), 0)
    last = next((at for at in range(1, shortest + 1) if len({part[-at] for part in parts}) > 1), 1)
    return [".".join(part[first : len(part) - last + 1]) or name for part, name in zip(parts, names, strict=True)]


def plural(count: int, noun: str) -> str:
    """A count and what is counted.

    >>> plural(1, "variant"), plural(3, "variant")
    ('1 variant', '3 variants')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
