"""A `moe_spec.progress.Progress` that remembers what it was told."""


class Heard:
    """Called as packages call it; every count is looked at."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int | None]] = []

    def __call__(self, what: str, done: int = 0, total: int | None = None, /) -> None:
        """Remember it; the counts of a phase rise to its total, and then may begin again."""
        assert total is None or 0 <= done <= total, (what, done, total)
        for before, most in self.counts(what)[-1:]:
            assert done >= before or (done, before) == (0, most), (what, before, done)
        self.told.append((what, done, total))

    def counts(self, what: str) -> list[tuple[int, int | None]]:
        """What was told of one phase."""
        return [(done, total) for phase, done, total in self.told if phase == what]

    def to_the_end(self) -> list[str]:
        """The phases with a total, in order, every one of which came to it."""
        last = {what: (done, total) for what, done, total in self.told if total is not None}
        assert all(done == total for done, total in last.values()), last
        return list(last)
