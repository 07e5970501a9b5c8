"""What a claim of a paper is here: words, a rule that is stated before anything is measured, and what came out."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

from benchmarks.markdown import mean_and_range
from benchmarks.tasks.metrics import Metric

YES, NO = "yes", "no"
DIGITS = 6
"""Of a difference: what lies beyond is how floats are rounded, and shall decide nothing."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came out on one task.

    Attributes:
        ours: the numbers that the claim speaks of, in a line.
        reproduced: whether they fulfil the claim's rule.
    """

    ours: str
    reproduced: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        findings: by task.
        details: all numbers, as tables.
    """

    findings: Mapping[str, Finding]
    details: str

    @property
    def ours(self) -> str:
        """All findings in a line."""
        return "; ".join(f"{task}: {finding.ours}" for task, finding in self.findings.items())

    @property
    def verdict(self) -> str:
        """Yes, no, or on which tasks.

        >>> Outcome({"images": Finding("", True), "code": Finding("", False)}, "").verdict
        'on images, not on code'
        """
        held = [task for task, finding in self.findings.items() if finding.reproduced]
        failed = [task for task, finding in self.findings.items() if not finding.reproduced]
        if held and failed:
            return f"on {', '.join(held)}, not on {', '.join(failed)}"
        return YES if held else NO


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence of a paper, put to the test.

    Attributes:
        paper: a Markdown link.
        claimed: what it says.
        rule: what counts as reproduced.
        setting: models, data and training that it is tested with.
        measure: does so, given the number of seeds and who is told how it goes.
        reason: the likely reason of what does not come out as claimed, and what else a reader should know.
    """

    paper: str
    claimed: str
    rule: str
    setting: str
    measure: Callable[[int, Callable[[str], None]], Outcome]
    reason: str


@dataclasses.dataclass(frozen=True)
class Scores:
    """A metric of the same model made with several seeds."""

    metric: Metric
    values: Sequence[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.values)

    def __str__(self) -> str:
        """The mean, and the range of several."""
        return mean_and_range(self.values, self.metric.spec)

    def worse_than(self, other: "Scores") -> float:
        """How much worse the mean is: points of accuracy, or percent of perplexity; below 0 where it is better.

        >>> from benchmarks.tasks.metrics import ACCURACY, PERPLEXITY
        >>> f"{Scores(ACCURACY, [0.91]).worse_than(Scores(ACCURACY, [0.93])):.1f}"
        '2.0'
        >>> f"{Scores(PERPLEXITY, [44.0]).worse_than(Scores(PERPLEXITY, [40.0])):.1f}"
        '10.0'
        """
        if self.metric.higher_is_better:
            return round(100 * (other.mean - self.mean), DIGITS)
        return round(100 * (self.mean / other.mean - 1), DIGITS)

    def loss(self, other: "Scores") -> str:
        """`worse_than` with its unit.

        >>> from benchmarks.tasks.metrics import ACCURACY
        >>> Scores(ACCURACY, [0.91]).loss(Scores(ACCURACY, [0.93]))
        '2.0 points'
        """
        return f"{self.worse_than(other):.1f} {'points' if self.metric.higher_is_better else '%'}"
