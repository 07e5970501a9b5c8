"""How long work tells how far it is. Packages tell; whoever calls them shows it, or does not."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Hears how far a piece of work is."""

    def __call__(self, what: str, done: int = 0, total: int | None = None, /) -> None:
        """``done`` of the ``total`` steps, examples or bytes of ``what``; None where the end cannot be told.

        ``what`` is a phase, a few words. It counts from 0 to its own total; told of 0 again, it begins again.
        """


def silent(what: str, done: int = 0, total: int | None = None, /) -> None:
    """The `Progress` of who does not ask."""


def counted(items: Iterable[Item], what: str, total: int, tell: Progress) -> Iterator[Item]:
    """``items``, ``total`` of them; ``tell`` hears of ``what`` before the first and after each.

    >>> list(counted("ab", "reading", 2, lambda *told: print(*told)))
    reading 0 2
    reading 1 2
    reading 2 2
    ['a', 'b']
    """
    tell(what, 0, total)
    for done, item in enumerate(items, start=1):
        yield item
        tell(what, done, total)
