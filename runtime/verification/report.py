"""parity.json: what `verify` measured and what it made of it."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from moe_spec.decoder import PRESENT
from moe_spec.record import Json, load_record, save_record
from runtime.bench import BenchRow
from runtime.text.greedy import GreedyParity
from runtime.verification.fault import Fault
from runtime.verification.tolerances import Tolerance

SCHEMA = 3
_REMAKE = "make it again with `moe-edge verify`"

MARGIN_EDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative margins at which tokens are counted apart: one count below the first, one from each of them on."""


@dataclasses.dataclass(frozen=True)
class LayerParity:
    """One MoE layer.

    A flip is a token for which candidate and reference select different experts. Flips are *judged* only on examples
    that did not flip in a lower layer: whatever follows a flip sees other hidden states.

    Attributes:
        name: of the layer.
        tokens: compared.
        flips: among all tokens.
        flip_rate: ``flips / tokens``.
        agreement: mean Jaccard index of the sets of selected experts.
        judged_tokens: tokens on which flips were judged.
        judged_flips: flips among them.
        faults: judged flips that rounding does not explain: the reference's margin was wide, and the gate mattered.
        largest_margin: of the judged flips, relative; None without a finite one.
        gate_error: largest relative difference of a gate on judged tokens that did not flip; None if not finite.
        usage: (E) of all tokens, how many chose each of the source model's experts in the candidate; empty without a
            router.
        margin_tokens: judged tokens by the reference's relative margin, one more count than `MARGIN_EDGES`; where there
            was nothing to choose between, a token is not counted.
        margin_flips: judged flips, likewise.
        scored_as: (E) the expert that the reference scores as the candidate scores this one; empty where that is always
            the same one, as far as scores tell them apart.
    """

    name: str
    tokens: int
    flips: int
    flip_rate: float
    agreement: float
    judged_tokens: int
    judged_flips: int
    faults: int
    largest_margin: float | None
    gate_error: float | None
    usage: tuple[int, ...] = ()
    margin_tokens: tuple[int, ...] = ()
    margin_flips: tuple[int, ...] = ()
    scored_as: tuple[int, ...] = ()

    @property
    def moved(self) -> dict[int, int]:
        """Experts with the scores of another, and which."""
        return {expert: other for expert, other in enumerate(self.scored_as) if expert != other}


@dataclasses.dataclass(frozen=True)
class OutputParity:
    """One output of the model.

    Attributes:
        name: of the output.
        examples: without any flip, on which elements were compared.
        max_abs: largest difference of an element on these examples; None if there are none, or if it is not finite.
        max_rel: ``max_abs`` over the reference's largest magnitude; None likewise.
        forced_max_rel: the same on all examples, the candidate's experts chosen by the reference's routers; None where
            that was not run, or if it is not finite.
        cosine: mean cosine of rows over all examples; None, like what follows, where the output is not floating.
        kl: mean ``KL(reference || candidate)`` of the softmax of rows.
        top1_agreement: share of rows whose largest entry is at the same place.
        esap: mean expected acceptance of the softmax of rows, 1 for identical ones.
    """

    name: str
    examples: int
    max_abs: float | None
    max_rel: float | None
    forced_max_rel: float | None
    cosine: float | None
    kl: float | None
    top1_agreement: float | None
    esap: float | None


@dataclasses.dataclass(frozen=True)
class TaskAccuracy:
    """Top-1 accuracy on labelled data.

    Attributes:
        reference: share of examples that it gets right.
        candidate: likewise.
        difference: candidate minus reference.
        examples: that both saw.
        low: the difference is at least this, with 95 % confidence.
        high: and at most this.
    """

    reference: float
    candidate: float
    difference: float
    examples: int
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The verdict and what it rests on.

    Attributes:
        passed: whether the candidate computes what the reference computes.
        reasons: why not; empty when it passed.
        first_wrong_layer: the lowest layer that went wrong, when it failed: that of ``fault`` where one was found, else
            the lowest whose routing differs by more than rounding.
        candidate_sha256: hash of the candidate's manifest.json; of a checkpoint or a lone .onnx file, its identity.
        reference_sha256: likewise, of the reference.
        data: what was fed, in words.
        data_sha256: hash of the task data; None for random feeds.
        examples: fed.
        precision: the number format that the tolerance belongs to, or ``as given``.
        tolerance: what was allowed.
        forced: whether the candidate was also run with the reference's routing.
        layers: in model order; None where one of the two is an engine, which shows no routers.
        outputs: in model order.
        accuracy: None without labels.
        greedy: how long decoders write the same; None for other models.
        cost: latency, memory and bytes of both, the reference first, where they were measured.
        fault: the first part that went wrong, where it was searched for and found.
        notes: what was not measured, and why.
    """

    passed: bool
    reasons: tuple[str, ...]
    first_wrong_layer: str | None
    candidate_sha256: str
    reference_sha256: str
    data: str
    data_sha256: str | None
    examples: int
    precision: str
    tolerance: Tolerance
    forced: bool
    layers: tuple[LayerParity, ...] | None
    outputs: tuple[OutputParity, ...]
    accuracy: TaskAccuracy | None
    greedy: GreedyParity | None = None
    cost: tuple[BenchRow, ...] = ()
    fault: Fault | None = None
    notes: tuple[str, ...] = ()

    @property
    def flips(self) -> int | None:
        """Flips in all layers; None where they could not be seen."""
        return None if self.layers is None else sum(layer.flips for layer in self.layers)

    @property
    def telling_outputs(self) -> tuple[OutputParity, ...]:
        """What people look at: a cache is an output for each tensor of each layer, and the worst stands for all."""
        kept = [output for output in self.outputs if output.name.startswith(PRESENT)]
        worst = sorted(kept, key=lambda output: math.inf if output.max_rel is None else output.max_rel)[-1:]
        return (*(output for output in self.outputs if output not in kept), *worst)

    def with_fault(self, fault: Fault) -> "ParityReport":
        """The report, and where the fault is that it tells of."""
        return dataclasses.replace(self, fault=fault, first_wrong_layer=fault.layer)

    def with_cost(self, rows: Sequence[BenchRow]) -> "ParityReport":
        """The report, and what both models cost."""
        return dataclasses.replace(self, cost=tuple(rows))

    def with_note(self, note: str) -> "ParityReport":
        """The report, and one more thing that was not measured."""
        return dataclasses.replace(self, notes=(*self.notes, note))

    def to_json(self) -> Json:
        """The report as it stands in parity.json."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write parity.json."""
        save_record(path, "parity", SCHEMA, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "ParityReport":
        """Read parity.json.

        Raises:
            UserError: the file is missing, cut, another artifact, or of another schema.
        """
        record = load_record(path, "parity", SCHEMA, _REMAKE)
        layers, accuracy = record.take("layers", list, default=None), record.record("accuracy")
        fault, greedy = (record.record(key) for key in ("fault", "greedy"))
        return cls(
            passed=record.take("passed", bool),
            reasons=record.items("reasons", str),
            first_wrong_layer=record.take("first_wrong_layer", str, default=None),
            candidate_sha256=record.take("candidate_sha256", str),
            reference_sha256=record.take("reference_sha256", str),
            data=record.take("data", str),
            data_sha256=record.take("data_sha256", str, default=None),
            examples=record.take("examples", int),
            precision=record.take("precision", str),
            tolerance=record.required("tolerance").row(Tolerance),
            forced=record.take("forced", bool),
            layers=None if layers is None else tuple(row.row(LayerParity) for row in record.records("layers")),
            outputs=tuple(row.row(OutputParity) for row in record.records("outputs")),
            accuracy=None if accuracy is None else accuracy.row(TaskAccuracy),
            greedy=None if greedy is None else greedy.row(GreedyParity),
            cost=tuple(row.row(BenchRow) for row in record.records("cost")),
            fault=None if fault is None else fault.row(Fault),
            notes=record.items("notes", str),
        )
