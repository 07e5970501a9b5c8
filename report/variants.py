"""The variants of a run: each graph or engine, with what was measured of it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from moe_spec.manifest import MODEL, BlockEntry, Manifest
from report.artifacts import Artifacts, Found
from runtime.backend import ENGINE, ENGINE_FILE
from runtime.bench import BenchRow
from runtime.verification.report import ParityReport

T = TypeVar("T")

UNPRUNED = "unpruned"
EXPORTED, OPTIMIZED = "exported", "optimized"
"""``Manifest.kind`` of graphs."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on labelled data.

    Attributes:
        value: share of examples that are right.
        examples: how many there were.
        low: the accuracy is at least this, with 95 % confidence.
        high: and at most this.
    """

    value: float
    examples: int
    low: float
    high: float

    @classmethod
    def of(cls, value: float, examples: int) -> "Accuracy":
        """With Wilson's interval (https://doi.org/10.1080/01621459.1927.10502953).

        >>> found = Accuracy.of(0.9, 100)
        >>> round(found.low, 3), round(found.high, 3)
        (0.826, 0.945)
        """
        squared = 1.959964**2
        center = (value + squared / (2 * examples)) / (1 + squared / examples)
        spread = math.sqrt(squared * (value * (1 - value) / examples + squared / (4 * examples**2)))
        half = spread / (1 + squared / examples)
        return cls(value, examples, min(value, center - half), max(value, center + half))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One graph, or an engine that was verified or timed itself.

    Attributes:
        label: its path, shortened where that is still unique.
        model: where it is, and its manifest.
        criterion: what ranked the experts that went, the method that trained them away, or `UNPRUNED`.
        parities: its parity reports, the one on labelled data first.
        cost: what was measured of it.
        engines: built from it.
    """

    label: str
    model: Found[Manifest]
    criterion: str
    parities: tuple[Found[ParityReport], ...]
    cost: tuple[BenchRow, ...]
    engines: tuple[Found[Manifest], ...]

    @property
    def blocks(self) -> tuple[BlockEntry, ...]:
        """Its MoE layers."""
        return self.model.value.blocks

    @property
    def experts(self) -> float | None:
        """Mean number of experts a layer; None for a model without MoE layers."""
        return sum(block.experts for block in self.blocks) / len(self.blocks) if self.blocks else None

    @property
    def drops(self) -> bool:
        """Whether experts of the checkpoint or file that it was made from are gone."""
        plan = self.model.value.plan
        return plan is not None and any(len(layer.keep) < layer.experts for layer in plan.layers)

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of its experts."""
        return tuple(sorted({block.form for block in self.blocks}))

    @property
    def file_bytes(self) -> int:
        """Of the graph and its weights, or of the engine."""
        return model_bytes(self.model.value)

    @property
    def parity(self) -> ParityReport | None:
        """The report that counts: one that failed, else the one on labelled data."""
        failed = (report.value for report in self.parities if not report.value.passed)
        return next(failed, self.parities[0].value if self.parities else None)

    @property
    def accuracy(self) -> Accuracy | None:
        """On labelled data; None where there was none."""
        found = (report.value.accuracy for report in self.parities)
        task = next((accuracy for accuracy in found if accuracy is not None), None)
        return None if task is None or not task.examples else Accuracy.of(task.candidate, task.examples)

    def latency(self, key: tuple[str, int]) -> float | None:
        """Median milliseconds of a phase and batch size."""
        return next((row.median_ms for row in self.cost if (row.phase, row.batch_size) == key), None)


def model_bytes(manifest: Manifest) -> int:
    """Of the graph and its weights, or of the engine, as the manifest says."""
    stem = ENGINE_FILE if manifest.kind == ENGINE and _has(manifest, ENGINE_FILE) else MODEL
    return sum(entry.bytes for entry in manifest.files if entry.name.startswith(stem))


def _has(manifest: Manifest, name: str) -> bool:
    return any(entry.name == name for entry in manifest.files)


def variants_of(artifacts: Artifacts) -> tuple[Variant, ...]:
    """Every graph, most experts first; graphs that only others were made from are left out unless measured."""
    parities = _by_model((report.value.candidate_sha256, report) for report in artifacts.parities)
    cost = _by_model(
        (bench.value.models[row.model], row)
        for bench in artifacts.benches
        for row in bench.value.rows
        if row.model in bench.value.models
    )
    parents = {model.value.parent_sha256 for model in artifacts.models if model.value.kind in (OPTIMIZED, EXPORTED)}
    methods = {sha256: record.method for sha256, record in artifacts.trained.items()}
    shown = [
        model
        for model in artifacts.models
        if model.sha256 in parities
        or model.sha256 in cost
        or model.value.kind == OPTIMIZED
        or (model.value.kind == EXPORTED and model.sha256 not in parents)
    ]
    labels = _labels([model.path for model in shown])
    found = [
        Variant(
            label=label,
            model=model,
            criterion=_criterion(model.value, methods),
            parities=tuple(sorted(parities.get(model.sha256, ()), key=lambda report: report.value.accuracy is None)),
            cost=tuple(cost.get(model.sha256, ())),
            engines=tuple(
                child
                for child in artifacts.models
                if child.value.kind == ENGINE and child.value.parent_sha256 == model.sha256
            ),
        )
        for label, model in zip(labels, shown, strict=True)
    ]
    return tuple(sorted(found, key=lambda variant: -(variant.experts or 0.0)))


def _by_model(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    grouped: dict[str, list[T]] = {}
    for sha256, value in pairs:
        grouped.setdefault(sha256, []).append(value)
    return grouped


def _criterion(manifest: Manifest, methods: Mapping[str, str]) -> str:
    if manifest.plan is not None:
        keeps_all = all(len(layer.keep) == layer.experts for layer in manifest.plan.layers)
        return UNPRUNED if keeps_all else manifest.plan.criterion
    return methods.get(manifest.source_sha256, UNPRUNED)


def _labels(paths: Sequence[str]) -> list[str]:
    """Without ``/optimized`` or ``/exported`` at the end, where what is left is still unique."""
    cut = [path.removesuffix(f"/{OPTIMIZED}").removesuffix(f"/{EXPORTED}") for path in paths]
    return [short if cut.count(short) == 1 else path for short, path in zip(cut, paths, strict=True)]


def cost_keys(variants: Iterable[Variant]) -> list[tuple[str, int]]:
    """The phases and batch sizes that were timed, in order."""
    return list(dict.fromkeys((row.phase, row.batch_size) for variant in variants for row in variant.cost))


def pareto(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Those of ``points`` (cost, accuracy) that no other beats in one and equals in the other.

    >>> sorted(pareto({"a": (1.0, 0.9), "b": (2.0, 0.9), "c": (2.0, 0.95)}))
    ['a', 'c']
    """
    return {
        name
        for name, (cost, value) in points.items()
        if not any(
            other_cost <= cost and other >= value and (other_cost, other) != (cost, value)
            for other_cost, other in points.values()
        )
    }
