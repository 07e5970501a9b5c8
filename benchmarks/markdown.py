"""Tables of the documents that benchmarks print."""

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
