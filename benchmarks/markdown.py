"""Tables of the documents that benchmarks print."""

import statistics
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are words, and the others numbers.

    >>> print(table(("form", "ms"), [("dense", "1.5")]))
    | form | ms |
    | --- | ---: |
    | dense | 1.5 |
    """
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def mean_and_range(values: Sequence[float], spec: str) -> str:
    """The mean, and the range where there are several; ``spec`` is how a number is shown.

    >>> mean_and_range([0.5, 1.0], ".1f"), mean_and_range([0.5], ".1f")
    ('0.8 (0.5 to 1.0)', '0.5')
    """
    mean = f"{statistics.mean(values):{spec}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{spec}} to {max(values):{spec}})"
