"""A `moe_spec.progress.Progress` that remembers what it was told."""


class Heard:
    """Called as packages call it; every count is looked at."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int | None]] = []

    def __call__(self, what: str, done: int = 0, total: int | None = None, /) -> None:
        """Remember it; the counts of a phase rise, and stay within its total."""
        if total is not None and (before := self._last()) is not None and before[::2] == (what, total):
            assert before[1] <= done, (before, done)
        assert total is None or 0 <= done <= total, (what, done, total)
        self.told.append((what, done, total))

    def _last(self) -> tuple[str, int, int | None] | None:
        return self.told[-1] if self.told else None

    def counts(self, what: str) -> list[tuple[int, int | None]]:
        """What was told of one phase."""
        return [(done, total) for phase, done, total in self.told if phase == what]

    def to_the_end(self) -> list[str]:
        """The phases with a total, in order, every one of which came to it."""
        last = {what: (done, total) for what, done, total in self.told if total is not None}
        assert all(done == total for done, total in last.values()), last
        return list(last)
