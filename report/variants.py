"""The variants of a run: each graph or engine, with what was measured of it."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from moe_spec.manifest import MODEL, BlockEntry, Manifest
from moe_spec.plan import PruningPlan
from report.artifacts import Artifacts, Found
from runtime.backend import ENGINE, ENGINE_FILE
from runtime.bench import BenchRow
from runtime.verification.report import ParityReport

T = TypeVar("T")

UNPRUNED = "unpruned"
PLAIN = "plain"
"""The method of fine-tuning that does nothing but train."""
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
    def rank(self) -> tuple[float, float]:
        """Smallest first; of those as large to two digits, the most accurate."""
        return float(f"{self.file_bytes:.2g}"), -(self.accuracy.value if self.accuracy else 0.0)

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


def targets_of(manifest: Manifest) -> list[str]:
    """What a model was made for; a TensorRT-RTX engine may run on several."""
    first, given = manifest.details.get("target"), manifest.details.get("arguments")
    if not isinstance(first, str):
        return []
    words = [word for argument in given if isinstance(argument, str) for word in argument.split()] if given else []
    return [first, *(name for option, name in itertools.pairwise(words) if option == "--also")]


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
    sources = _criteria(artifacts)
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
            criterion=_criterion(model.value, sources),
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


def distinct(variants: Sequence[Variant]) -> list[Variant]:
    """The first of those that are one model in several forms: the same experts and formats, and right as often."""
    first: dict[tuple[object, ...], Variant] = {}
    for variant in variants:
        manifest = variant.model.value
        formats = str(manifest.details.get("precision")), str(manifest.details.get("activations"))
        kept = tuple((block.name, tuple(block.keep)) for block in manifest.blocks)
        first.setdefault((manifest.model_sha256, kept, *formats, variant.accuracy), variant)
    return list(first.values())


def _by_model(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    grouped: dict[str, list[T]] = {}
    for sha256, value in pairs:
        grouped.setdefault(sha256, []).append(value)
    return grouped


def _criteria(artifacts: Artifacts) -> dict[str, str]:
    """Of checkpoints, by identity: what ranked the experts that went, and how what is left was trained."""
    found = {sha256: _ranked_by(plan) for sha256, plan in artifacts.pruned.items()}
    for sha256, record in artifacts.trained.items():
        how = "fine-tuned" if record.method == PLAIN else record.method
        before = found.get(record.model_sha256, UNPRUNED)
        found[sha256] = how if before == UNPRUNED else f"{before}, {how}"
    return found


def _ranked_by(plan: PruningPlan) -> str:
    return plan.criterion if any(len(layer.keep) < layer.experts for layer in plan.layers) else UNPRUNED


def _criterion(manifest: Manifest, sources: Mapping[str, str]) -> str:
    before = sources.get(manifest.source_sha256, UNPRUNED)
    here = UNPRUNED if manifest.plan is None else _ranked_by(manifest.plan)
    return before if here == UNPRUNED else here


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
