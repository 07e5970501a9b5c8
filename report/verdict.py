"""May it ship? A rule that stands on the page, applied to what was measured."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from report.artifacts import Artifacts
from report.variants import Accuracy, Variant
from report.words import number, percent, plural, points, size
from runtime.verification.report import ParityReport

SHIP, COSTS, PROVEN, FAILS, UNVERIFIED = "ship", "costs", "proven", "fails", "unverified"
"""States of a verdict: a pruned variant may ship; all lose too much; what they lose is unknown; something is wrong;
nothing was verified. Likewise of a variant."""
WHOLE = "unpruned"
"""A proven variant that has all experts: what others are measured by."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the page says first.

    Attributes:
        state: one of those above.
        headline: in one sentence.
        reasons: what it rests on, a sentence each.
        rule: what had to hold.
        baseline: accuracy of the unpruned model; None where it was not measured.
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
    baseline = baseline_of(variants)
    rule = (
        "A variant may ship if verify passed it, no file of it changed since, and it loses at most "
        f"{_points(max_loss)} of the unpruned model's accuracy, as measured (--max-loss)."
    )
    decisions = {variant.label: _decide(artifacts, variant, variants, baseline, max_loss) for variant in variants}
    fit = [variant for variant in variants if decisions[variant.label] == SHIP]
    chosen = min(fit, key=lambda variant: variant.rank, default=None)
    state, headline = _state(artifacts, variants, chosen, baseline, max_loss)
    reasons = tuple(_reasons(artifacts, variants, chosen, baseline))
    label = None if chosen is None else chosen.label
    return Verdict(state, headline, reasons, rule, baseline, label, decisions, max_loss)


def _points(share: float) -> str:
    return f"{number(100 * share)} point" + ("" if share == 0.01 else "s")


def baseline_of(variants: Sequence[Variant]) -> Accuracy | None:
    """Accuracy of the variant that has most experts, if none of its model is gone."""
    whole = [variant for variant in variants if variant.accuracy is not None and not variant.drops]
    most = max((variant.experts or 0.0 for variant in whole), default=0.0)
    if any((variant.experts or 0.0) > most for variant in variants):
        return None  # the larger one was not measured
    return next((variant.accuracy for variant in whole if (variant.experts or 0.0) == most), None)


def is_pruned(variant: Variant, variants: Sequence[Variant]) -> bool:
    """Whether it has fewer experts than the largest of the run, or lost some."""
    return variant.drops or (variant.experts or 0.0) < max(other.experts or 0.0 for other in variants)


def unpruned(variants: Sequence[Variant]) -> Variant | None:
    """What pruned variants are compared with: the largest with all experts, of those that did not fail."""
    whole = [variant for variant in variants if not is_pruned(variant, variants)]
    right = [variant for variant in whole if variant.parity is None or variant.parity.passed]
    return max(right, key=lambda variant: variant.file_bytes, default=None)


def _decide(
    artifacts: Artifacts, variant: Variant, variants: Sequence[Variant], baseline: Accuracy | None, max_loss: float
) -> str:
    """The rule, for one variant."""
    if variant.model.path in artifacts.damages or (variant.parity is not None and not variant.parity.passed):
        return FAILS
    if variant.parity is None:
        return UNVERIFIED
    if not is_pruned(variant, variants):
        return WHOLE
    if variant.accuracy is None or baseline is None:
        return PROVEN
    return SHIP if variant.accuracy.value >= baseline.value - max_loss - 1e-9 else COSTS


def _state(
    artifacts: Artifacts,
    variants: Sequence[Variant],
    chosen: Variant | None,
    baseline: Accuracy | None,
    max_loss: float,
) -> tuple[str, str]:
    verified = [variant for variant in variants if variant.parity is not None]
    failed = [variant for variant in verified if variant.parity is not None and not variant.parity.passed]
    if artifacts.damages:
        return FAILS, f"{plural(len(artifacts.damages), 'model')} changed after it was made"
    if failed:
        names = ", ".join(variant.label for variant in failed)
        return FAILS, f"{names} {'does not compute what it' if len(failed) == 1 else 'do not compute what they'} should"
    if not verified:
        return UNVERIFIED, "Nothing was verified yet"
    if chosen is not None:
        return SHIP, f"{chosen.label} may ship"
    if baseline is None or not any(is_pruned(variant, variants) for variant in verified if variant.accuracy):
        return PROVEN, "Everything verified computes what it should; what pruning costs is not known"
    return COSTS, f"Proven, but every pruned variant loses more than {_points(max_loss)}"


def _reasons(
    artifacts: Artifacts, variants: Sequence[Variant], chosen: Variant | None, baseline: Accuracy | None
) -> Iterator[str]:
    yield from (f"{path}: {reason}" for path, reason in sorted(artifacts.damages.items()))
    verified = [variant for variant in variants if variant.parity is not None]
    for variant in verified:
        if variant.parity is not None and not variant.parity.passed:
            yield f"{variant.label}: {_why(variant.parity)}"
    passed = sum(variant.parity is not None and variant.parity.passed for variant in verified)
    if verified:
        yield _how_many_passed(passed, len(verified))
    whole = unpruned(variants)
    best = chosen or _closest(variants)
    if best is not None and best.accuracy is not None and baseline is not None:
        loss = points(best.accuracy.value - baseline.value)
        share = "" if whole is None else f", {percent(best.file_bytes / whole.file_bytes, 0)} of the unpruned graph"
        name = "It" if chosen else f"The closest, {best.label},"
        yield (
            f"{name} answers {percent(best.accuracy.value)} of {best.accuracy.examples:,} examples right "
            f"({loss} points) in {size(best.file_bytes)}{share}."
        )
        if chosen is not None:
            yield from _smaller(variants, chosen, baseline)
    if verified and baseline is None:
        yield (
            "The accuracy of the unpruned model is not in this directory: moe-edge verify EXPORTED --reference "
            "CHECKPOINT --data TEST.npz -o unpruned.json"
        )
    if not verified:
        yield "moe-edge verify MODEL --reference EXPORTED --data TEST.npz -o parity.json"


def _why(report: ParityReport) -> str:
    """Where the fault is, if that was found, else the first of what was wrong; the rest stands further down."""
    first, *others = report.reasons or ("no reason is given",)
    if report.fault is not None:
        first, others = f"the fault is in {report.fault.place}: {report.fault.says}", list(report.reasons)
    return first + (f"; {plural(len(others), 'finding')} under Parity" if others else "")


def _smaller(variants: Sequence[Variant], chosen: Variant, baseline: Accuracy) -> Iterator[str]:
    """What the best of those would cost that are proven, smaller than the chosen one, and lose too much."""
    rest = [
        (variant.accuracy.value, variant)
        for variant in variants
        if variant.accuracy is not None
        and variant.parity is not None
        and variant.parity.passed
        and variant.rank[0] < chosen.rank[0]
    ]
    if rest:
        value, best = max(rest, key=lambda pair: pair[0])
        loss = points(baseline.value - value).lstrip("+")
        yield f"Smaller, {size(best.file_bytes)}, is {best.label}, which loses {loss} points."


def _how_many_passed(passed: int, verified: int) -> str:
    """In words.

    >>> _how_many_passed(1, 1)
    'The one verified variant computes what its reference computes.'
    """
    if passed == verified == 1:
        return "The one verified variant computes what its reference computes."
    count = "All" if passed == verified else f"{passed} of"
    return f"{count} {plural(verified, 'verified variant')} compute what their references compute."


def _closest(variants: Sequence[Variant]) -> Variant | None:
    pruned = [variant for variant in variants if is_pruned(variant, variants) and variant.accuracy is not None]
    return max(pruned, key=lambda variant: variant.accuracy.value if variant.accuracy else 0.0, default=None)
