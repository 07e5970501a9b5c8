"""May it ship? A rule that stands on the page, applied to what was measured."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from report.artifacts import Artifacts
from report.names import called
from report.variants import Accuracy, Variant, strays
from report.words import number, percent, plural, points, size
from runtime.verification.report import ParityReport

SHIP, COSTS, PROVEN, FAILS, UNVERIFIED = "ship", "costs", "proven", "fails", "unverified"
"""States of a verdict: a smaller variant may ship; all lose too much; what they lose is unknown; something is wrong;
nothing was verified. Likewise of a variant."""
WHOLE = "unpruned"
"""A proven variant that has all experts and digits: what others are measured by."""
GONE = "of a model that is not here or was changed since"
"""Of a parity report whose candidate is none of the run."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the page says first.

    Attributes:
        state: one of those above.
        headline: in one sentence.
        reasons: what it rests on, a sentence each.
        rule: what had to hold.
        baseline: accuracy of the unpruned model that the chosen one, or the closest, was made from; None where it was
            not measured.
        chosen: label of the variant that may ship, the smallest; else None.
        decisions: on each variant, by its label: one of those states, or `WHOLE`.
        max_loss: of 1 in accuracy, what a variant may lose and still ship.
    """

    state: str
    headline: str
    reasons: tuple[str, ...]
    rule: str
    baseline: Accuracy | None
    chosen: str | None
    decisions: Mapping[str, str]
    max_loss: float


def judge(artifacts: Artifacts, variants: Sequence[Variant], max_loss: float) -> Verdict:
    """The verdict on a run; a variant may ship if it is proven and loses at most ``max_loss`` of 1 in accuracy."""
    decisions = {variant.label: _decide(artifacts, variant, variants, max_loss) for variant in variants}
    case = _Case(artifacts, variants, decisions, max_loss)
    state, headline = case.state()
    rule = (
        "A variant may ship if verify passed it, no file of it changed since, and it loses at most "
        f"{_points(max_loss)} of the unpruned model's accuracy, as measured (--max-loss)."
    )
    label = None if case.chosen is None else case.chosen.label
    return Verdict(state, headline, tuple(case.reasons()), rule, case.baseline, label, decisions, max_loss)


def _points(share: float) -> str:
    return f"{number(100 * share)} point" + ("" if share == 0.01 else "s")


def whole_of(variant: Variant, variants: Sequence[Variant]) -> Variant | None:
    """What ``variant`` is compared with: of what has all experts of the same model, and passed, the largest.

    One of which the accuracy is known goes before.
    """
    whole = [other for other in variants if other.origin == variant.origin and other.unpruned and other.passed]
    return max(whole, key=lambda other: (other.accuracy is not None, other.file_bytes), default=None)


def loss_of(variant: Variant, variants: Sequence[Variant]) -> float | None:
    """What ``variant`` loses of the accuracy of the model with all experts, of 1; None where that is not known."""
    whole = whole_of(variant, variants)
    if whole is None or whole.accuracy is None or variant.accuracy is None:
        return None
    return whole.accuracy.value - variant.accuracy.value


def _decide(artifacts: Artifacts, variant: Variant, variants: Sequence[Variant], max_loss: float) -> str:
    """The rule, for one variant."""
    if variant.model.path in artifacts.damages or (variant.parity is not None and not variant.passed):
        return FAILS
    if variant.parity is None:
        return UNVERIFIED
    if variant.unpruned:
        return WHOLE
    loss = loss_of(variant, variants)
    if loss is None:
        return PROVEN
    return SHIP if loss <= max_loss + 1e-9 else COSTS


class _Case:
    """A run and what was decided on its variants."""

    def __init__(
        self, artifacts: Artifacts, variants: Sequence[Variant], decisions: Mapping[str, str], max_loss: float
    ) -> None:
        self._artifacts, self._variants, self._max_loss = artifacts, variants, max_loss
        self._decisions = decisions
        self._strays = strays(artifacts, variants)
        self._verified = [(variant.label, variant.parity) for variant in variants if variant.parity is not None]
        self._verified += [(path, found.value) for path, found in self._strays if path]
        self.chosen = min(self._decided(SHIP), key=lambda variant: variant.rank, default=None)
        rated = self._decided(SHIP, COSTS)
        self._closest = self.chosen or min(rated, key=lambda variant: loss_of(variant, variants) or 0.0, default=None)

    def _decided(self, *states: str) -> list[Variant]:
        return [variant for variant in self._variants if self._decisions[variant.label] in states]

    @property
    def baseline(self) -> Accuracy | None:
        """Of what the chosen variant, or the closest, was made from; or of whatever has all experts."""
        of = [self._closest] if self._closest else self._variants
        found = (whole_of(variant, self._variants) for variant in of)
        return next((whole.accuracy for whole in found if whole is not None and whole.accuracy is not None), None)

    def state(self) -> tuple[str, str]:
        """And the headline."""
        damages, failed = self._artifacts.damages, [name for name, report in self._verified if not report.passed]
        if damages:
            return FAILS, f"{plural(len(damages), 'model')} changed after it was made"
        if failed:
            what = "does not compute what it" if len(failed) == 1 else "do not compute what they"
            return FAILS, f"{', '.join(failed)} {what} should"
        if not self._verified:
            return UNVERIFIED, f"Nothing {'that is here was verified' if self._strays else 'was verified yet'}"
        if self.chosen is not None:
            return SHIP, f"{self.chosen.label} may ship"
        over, unknown = self._decided(COSTS), self._decided(PROVEN, UNVERIFIED)
        if not over:
            return PROVEN, "Everything verified computes what it should; what pruning costs is not known"
        measured = " that was measured" if any(not variant.unpruned for variant in unknown) else ""
        return COSTS, f"Proven, but every {kind_of(over)} variant{measured} loses more than {_points(self._max_loss)}"

    def reasons(self) -> Iterator[str]:
        """What it rests on."""
        yield from (f"{path}: {reason}" for path, reason in sorted(self._artifacts.damages.items()))
        yield from (f"{name}: {_why(report)}" for name, report in self._verified if not report.passed)
        if self._verified:
            yield _how_many_passed(sum(report.passed for _, report in self._verified), len(self._verified))
        yield from self._not_judged()
        if self._closest is not None:
            yield from self._measured(self._closest)
        if self._verified and self.baseline is None:
            yield (
                "The accuracy of the unpruned model is not in this directory: moe-edge verify EXPORTED --reference "
                "CHECKPOINT --data TEST.npz -o unpruned.json"
            )
        if not self._verified:
            yield "moe-edge verify MODEL --reference EXPORTED --data TEST.npz -o parity.json"

    def _not_judged(self) -> Iterator[str]:
        """Of what was verified and does not count, and why."""
        for path, found in self._strays:
            if not path:
                failed = "" if found.value.passed else f", and failed: {_why(found.value)}"
                yield f"{found.path} is {GONE}{failed}"
        for variant in self._variants:
            for found in variant.unfit:
                name = called(self._artifacts, found.value.reference_sha256)
                yield f"{found.path} proves nothing: {variant.label} was not made from {name}"
            whole = whole_of(variant, self._variants)
            is_known = variant.unpruned or whole is None or whole.accuracy is None
            if variant.accuracies and variant.accuracy is None and not is_known:
                yield f"{variant.label} was measured on other data than the unpruned model: its loss is not known."

    def _measured(self, best: Variant) -> Iterator[str]:
        """What the one that may ship, or the closest to that, loses and gains; what the next smaller one would lose."""
        whole, loss = whole_of(best, self._variants), loss_of(best, self._variants)
        if whole is None or loss is None or best.accuracy is None:
            return
        name = "It" if best is self.chosen else f"The closest, {best.label},"
        yield (
            f"{name} answers {percent(best.accuracy.value)} of {best.accuracy.examples:,} examples right "
            f"({points(-loss)} points) in {size(best.file_bytes)}, {percent(best.file_bytes / whole.file_bytes, 0)} of "
            "the unpruned graph."
        )
        smaller = [variant for variant in self._decided(COSTS) if variant.rank[0] < best.rank[0]]
        if best is self.chosen and smaller:
            losses = {variant.label: loss_of(variant, self._variants) or 0.0 for variant in smaller}
            other = min(smaller, key=lambda variant: losses[variant.label])
            lost = points(losses[other.label]).lstrip("+")
            yield f"Smaller, {size(other.file_bytes)}, is {other.label}, which loses {lost} points."


def kind_of(variants: Sequence[Variant]) -> str:
    """What became of ``variants``, in a word or two."""
    return " or ".join(sorted({"rounded" if variant.whole else "pruned" for variant in variants}))


def _why(report: ParityReport) -> str:
    """Where the fault is, if that was found, else the first of what was wrong; the rest stands further down."""
    first, *others = report.reasons or ("no reason is given",)
    if report.fault is not None:
        first, others = f"the fault is in {report.fault.place}: {report.fault.says}", list(report.reasons)
    return first + (f"; {plural(len(others), 'finding')} under Parity" if others else "")


def _how_many_passed(passed: int, verified: int) -> str:
    """In words.

    >>> _how_many_passed(1, 1)
    'The one verified variant computes what its reference computes.'
    """
    if passed == verified == 1:
        return "The one verified variant computes what its reference computes."
    count = "All" if passed == verified else f"{passed} of"
    return f"{count} {plural(verified, 'verified variant')} compute what their references compute."
