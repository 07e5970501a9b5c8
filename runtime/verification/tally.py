"""Sums over batches from which a parity report is made, so that memory does not grow with the data."""

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.decoder import PRESENT
from moe_spec.runner import error_between
from runtime import parity
from runtime.parity import Flags, Routing, ScoreMatch, TokenParity
from runtime.verification.report import MARGIN_EDGES, LayerParity, OutputParity, TaskAccuracy
from runtime.verification.tolerances import Tolerance


def _no_margins() -> npt.NDArray[np.int64]:
    return _by_margin(np.zeros(0))


@dataclasses.dataclass
class LayerTally:
    """Sums of one layer."""

    name: str
    tolerance: Tolerance
    tokens: int = 0
    flips: int = 0
    agreement: float = 0.0
    judged_tokens: int = 0
    judged_flips: int = 0
    faults: int = 0
    largest_margin: float = 0.0
    gate_error: float = 0.0
    usage_E: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    margin_tokens: npt.NDArray[np.int64] = dataclasses.field(default_factory=_no_margins)
    margin_flips: npt.NDArray[np.int64] = dataclasses.field(default_factory=_no_margins)
    match: ScoreMatch = dataclasses.field(default_factory=ScoreMatch)

    def add(self, tokens: TokenParity, judged_T: Flags, reference: Routing, candidate: Routing) -> None:
        """Take in a batch.

        Args:
            tokens: reference against candidate.
            judged_T: tokens of examples that flipped in no lower layer.
            reference: what it did.
            candidate: likewise.
        """
        flips = tokens.flipped & judged_T
        same = ~tokens.flipped & judged_T
        # an expert whose gate is below the tolerance changes nothing that the element comparison could see
        faults = flips & (tokens.margin > self.tolerance.margin) & (tokens.weight > self.tolerance.element)
        self.tokens += len(judged_T)
        self.flips += int(tokens.flipped.sum())
        self.agreement += float(tokens.agreement.sum())
        self.judged_tokens += int(judged_T.sum())
        self.judged_flips += int(flips.sum())
        self.faults += int(faults.sum())
        self.largest_margin = max(self.largest_margin, float(tokens.margin[flips].max(initial=0.0)))
        self.gate_error = max(self.gate_error, float(tokens.gate_error[same].max(initial=0.0)))
        self.usage_E = (candidate.gates != 0).sum(axis=0) + (self.usage_E if self.usage_E.size else 0)
        self.margin_tokens += _by_margin(tokens.margin[judged_T])
        self.margin_flips += _by_margin(tokens.margin[flips])
        self.match.add(reference, candidate)  # flips below make noise, which does not look like another expert

    def report(self) -> LayerParity:
        """What came of it."""
        moved = self.match.moved()
        return LayerParity(
            name=self.name,
            tokens=self.tokens,
            flips=self.flips,
            flip_rate=self.flips / max(self.tokens, 1),
            agreement=self.agreement / self.tokens if self.tokens else 1.0,
            judged_tokens=self.judged_tokens,
            judged_flips=self.judged_flips,
            faults=self.faults,
            largest_margin=_finite(self.largest_margin),
            gate_error=_finite(self.gate_error),
            usage=tuple(self.usage_E.tolist()),
            margin_tokens=tuple(self.margin_tokens.tolist()),
            margin_flips=tuple(self.margin_flips.tolist()),
            scored_as=tuple(moved.get(expert, expert) for expert in range(len(self.usage_E))) if moved else (),
        )


def _by_margin(margins_T: parity.Floats) -> npt.NDArray[np.int64]:
    places = np.digitize(margins_T[np.isfinite(margins_T)], MARGIN_EDGES)
    return np.bincount(places, minlength=len(MARGIN_EDGES) + 1)


@dataclasses.dataclass
class OutputTally:
    """Sums of one output."""

    name: str
    examples: int = 0
    max_abs: float = 0.0
    magnitude: float = 0.0
    rows: int = 0
    cosine: float = 0.0
    kl: float = 0.0
    same_top1: int = 0
    esap: float = 0.0
    forced_abs: float | None = None
    largest: float = 0.0

    def add(self, reference: npt.NDArray[Any], candidate: npt.NDArray[Any], clean_B: Flags) -> None:
        """Take in a batch of one shape; ``clean_B`` marks the examples without any flip."""
        self._add_elements(reference.astype(np.float64), candidate.astype(np.float64), clean_B)
        if self.name.startswith(PRESENT):  # keys and values are no distribution
            return
        if np.issubdtype(reference.dtype, np.floating) and reference.ndim > 0 and reference.shape[-1] > 0:
            width = reference.shape[-1]
            self._add_rows(reference.reshape(-1, width).astype(float), candidate.reshape(-1, width).astype(float))

    def add_forced(self, reference: npt.NDArray[Any], forced: npt.NDArray[Any]) -> None:
        """Take in the same batch, of a candidate whose experts the reference's routers chose."""
        wide = reference.astype(np.float64)
        self.forced_abs = max(self.forced_abs or 0.0, error_between(wide, forced)[0])
        self.largest = max(self.largest, float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0)))

    def _add_elements(self, reference: parity.Floats, candidate: parity.Floats, clean_B: Flags) -> None:
        if reference.ndim == 0 or len(reference) % len(clean_B):  # no axis of examples: any flip may change anything
            clean_B = np.array([clean_B.all()])
        by_example = (len(clean_B), -1)
        mine, theirs = reference.reshape(by_example)[clean_B], candidate.reshape(by_example)[clean_B]
        difference = np.where(mine == theirs, 0.0, np.abs(mine - theirs))  # equal infinities differ by nothing
        self.examples += int(clean_B.sum())
        self.max_abs = max(self.max_abs, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
        self.magnitude = max(self.magnitude, float(np.abs(mine[np.isfinite(mine)]).max(initial=0.0)))

    def _add_rows(self, reference_RV: parity.Floats, candidate_RV: parity.Floats) -> None:
        p_RV, q_RV = parity.softmax(reference_RV), parity.softmax(candidate_RV)
        self.rows += len(reference_RV)
        self.cosine += float(parity.cosine(reference_RV, candidate_RV).sum())
        self.kl += float(parity.kl_divergence(p_RV, q_RV).sum())
        self.esap += float(parity.esap(p_RV, q_RV).sum())
        self.same_top1 += int(parity.same_top1(reference_RV, candidate_RV).sum())

    def report(self) -> OutputParity:
        """What came of it."""
        compared = self.examples > 0

        def mean(total: float) -> float | None:
            return _finite(total / self.rows) if self.rows else None

        return OutputParity(
            name=self.name,
            examples=self.examples,
            max_abs=_finite(self.max_abs) if compared else None,
            max_rel=_finite(self.max_abs / max(self.magnitude, 1e-30)) if compared else None,
            forced_max_rel=None if self.forced_abs is None else _finite(self.forced_abs / max(self.largest, 1e-30)),
            cosine=mean(self.cosine),
            kl=mean(self.kl),
            top1_agreement=mean(self.same_top1),
            esap=mean(self.esap),
        )


@dataclasses.dataclass
class AccuracyTally:
    """Correct answers of both models."""

    both: int = 0
    only_reference: int = 0
    only_candidate: int = 0
    examples: int = 0

    def add(
        self, reference_NC: npt.NDArray[Any], candidate_NC: npt.NDArray[Any], labels_N: npt.NDArray[np.int64]
    ) -> None:
        """Take in a batch of logits."""
        mine_N, theirs_N = (table.argmax(axis=-1) == labels_N for table in (reference_NC, candidate_NC))
        self.both += int((mine_N & theirs_N).sum())
        self.only_reference += int((mine_N & ~theirs_N).sum())
        self.only_candidate += int((~mine_N & theirs_N).sum())
        self.examples += len(labels_N)

    def report(self) -> TaskAccuracy | None:
        """What came of it; None without labels."""
        if not self.examples:
            return None
        mine, theirs = ((self.both + only) / self.examples for only in (self.only_reference, self.only_candidate))
        interval = parity.paired_interval(self.only_reference, self.only_candidate, self.examples)
        return TaskAccuracy(mine, theirs, theirs - mine, self.examples, *interval)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
