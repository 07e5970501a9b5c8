"""The variants of a run: each graph or engine, with what was measured of it."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from moe_spec.manifest import MODEL, BlockEntry, Manifest
from moe_spec.plan import PruningPlan
from report.artifacts import Artifacts, Found
from report.lineage import Lineage, drops
from runtime.backend import ENGINE, ENGINE_FILE
from runtime.bench import BenchRow
from runtime.verification.report import ParityReport

T = TypeVar("T")

UNPRUNED = "unpruned"
PLAIN = "plain"
"""The method of fine-tuning that does nothing but train."""
EXPORTED, OPTIMIZED = "exported", "optimized"
"""``Manifest.kind`` of graphs."""
WIDEST = "float32"
"""The one number format in which nothing is rounded."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on labelled data.

    Attributes:
        value: share of examples that are right.
        examples: how many there were.
        low: the accuracy is at least this, with 95 % confidence.
        high: and at most this.
        data_sha256: of the data; accuracies are compared where that is the same.
    """

    value: float
    examples: int
    low: float
    high: float
    data_sha256: str | None = None

    @classmethod
    def of(cls, value: float, examples: int, data_sha256: str | None = None) -> "Accuracy":
        """With Wilson's interval (https://doi.org/10.1080/01621459.1927.10502953).

        >>> found = Accuracy.of(0.9, 100)
        >>> round(found.low, 3), round(found.high, 3)
        (0.826, 0.945)
        """
        squared = 1.959964**2
        center = (value + squared / (2 * examples)) / (1 + squared / examples)
        spread = math.sqrt(squared * (value * (1 - value) / examples + squared / (4 * examples**2)))
        half = spread / (1 + squared / examples)
        return cls(value, examples, min(value, center - half), max(value, center + half), data_sha256)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One graph, or an engine that was verified or timed itself.

    Attributes:
        label: its path, shortened where that is still unique.
        model: where it is, and its manifest.
        criterion: what ranked the experts that went, the method that trained them away, or `UNPRUNED`.
        parities: its parity reports.
        unfit: those of ``parities`` that passed beside a reference that it was not made from, and so prove nothing.
        cost: what was measured of it.
        engines: built from it.
        origin: identity of what it was made from, where that still had all experts (`Lineage.origin`).
        whole: whether it has them too.
        rounded: whether it was asked for in other number formats.
        data_sha256: of what accuracies are compared on; None where there are none.
    """

    label: str
    model: Found[Manifest]
    criterion: str
    parities: tuple[Found[ParityReport], ...]
    unfit: tuple[Found[ParityReport], ...]
    cost: tuple[BenchRow, ...]
    engines: tuple[Found[Manifest], ...]
    origin: str
    whole: bool
    rounded: bool
    data_sha256: str | None = None

    @property
    def unpruned(self) -> bool:
        """Whether it has all experts and all digits, so that others are measured by it."""
        return self.whole and not self.rounded

    @property
    def blocks(self) -> tuple[BlockEntry, ...]:
        """Its MoE layers."""
        return self.model.value.blocks

    @property
    def experts(self) -> float | None:
        """Mean number of experts a layer; None for a model without MoE layers."""
        return sum(block.experts for block in self.blocks) / len(self.blocks) if self.blocks else None

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
        """The report that counts: one that failed, else one on the data that accuracies are compared on."""
        reports = [found.value for found in self.parities if found not in self.unfit]
        return min(reports, key=lambda one: (one.passed, one.data_sha256 != self.data_sha256), default=None)

    @property
    def passed(self) -> bool:
        """Whether it was verified, and computes what it should."""
        return self.parity is not None and self.parity.passed

    @property
    def accuracies(self) -> tuple[Accuracy, ...]:
        """On all labelled data."""
        return tuple(
            Accuracy.of(task.candidate, task.examples, found.value.data_sha256)
            for found in self.parities
            if (task := found.value.accuracy) is not None and task.examples
        )

    @property
    def accuracy(self) -> Accuracy | None:
        """On the data that accuracies are compared on; None where it was not run on that."""
        return next((found for found in self.accuracies if found.data_sha256 == self.data_sha256), None)

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
    cost = _by_model(_costs(artifacts))
    parents = {model.value.parent_sha256 for model in artifacts.models if model.value.kind in (OPTIMIZED, EXPORTED)}
    shown = [
        model
        for model in artifacts.models
        if model.sha256 in parities
        or model.sha256 in cost
        or model.value.kind == OPTIMIZED
        or (model.value.kind == EXPORTED and model.sha256 not in parents)
    ]
    sources, lineage = _criteria(artifacts), Lineage(artifacts)
    found = [
        _variant(artifacts, lineage, label, model, sources, parities.get(model.sha256, ()), cost.get(model.sha256, ()))
        for label, model in zip(_labels([model.path for model in shown]), shown, strict=True)
    ]
    return tuple(sorted(_on_the_same_data(found), key=lambda variant: -(variant.experts or 0.0)))


def _variant(
    artifacts: Artifacts,
    lineage: Lineage,
    label: str,
    model: Found[Manifest],
    sources: Mapping[str, str],
    parities: Sequence[Found[ParityReport]],
    cost: Sequence[BenchRow],
) -> Variant:
    children = [child for child in artifacts.models if child.value.parent_sha256 == model.sha256]
    variant = Variant(
        label=label,
        model=model,
        criterion=_criterion(model.value, sources),
        parities=tuple(parities),
        unfit=(),
        cost=tuple(cost),
        engines=tuple(child for child in children if child.value.kind == ENGINE),
        origin=lineage.origin(model.sha256),
        whole=lineage.is_whole(model.sha256),
        rounded=any(map(_is_rounded, lineage.line(model.sha256))),
    )
    if variant.unpruned:  # beside itself it passes, and is right: it shows what all experts can do
        return variant
    passed = [found for found in parities if found.value.passed]
    unfit = [found for found in passed if not lineage.is_reference(found.value.reference_sha256, model.sha256)]
    return dataclasses.replace(variant, unfit=tuple(unfit))


def _is_rounded(manifest: Manifest) -> bool:
    """Whether another number format was asked for, of experts, the rest or activations."""
    asked = manifest.details.get("precision")
    formats = [asked.get(part) for part in ("experts", "rest")] if isinstance(asked, dict) else []
    return any(name not in (None, WIDEST) for name in formats) or bool(manifest.details.get("activations"))


def _on_the_same_data(variants: Sequence[Variant]) -> Iterator[Variant]:
    """Those of one origin with the data that their accuracies are compared on."""
    for variant in variants:
        related = [other for other in variants if other.origin == variant.origin]
        yield dataclasses.replace(variant, data_sha256=_data(related))


def _data(variants: Sequence[Variant]) -> str | None:
    """What most of ``variants`` were run on; where unpruned ones were run, it is something that those were run on."""
    runs = collections.Counter(
        sha256 for variant in variants for sha256 in {found.data_sha256 for found in variant.accuracies}
    )
    known = [found for variant in variants if variant.unpruned for found in variant.accuracies]
    known = known or [found for variant in variants for found in variant.accuracies]
    chosen = max(
        known, key=lambda found: (runs[found.data_sha256], found.examples, found.data_sha256 or ""), default=None
    )
    return None if chosen is None else chosen.data_sha256


def strays(artifacts: Artifacts, variants: Sequence[Variant]) -> list[tuple[str, Found[ParityReport]]]:
    """Reports on what is no variant: with the path of the checkpoint that it is, which is empty where it is not here.

    A model that is made again, or changed, is another one: reports on it are of a model that is not here any more.
    """
    there = {variant.model.sha256 for variant in variants}
    checkpoints = {found.sha256: found.path for found in artifacts.checkpoints}
    others = [found for found in artifacts.parities if found.value.candidate_sha256 not in there]
    return [(checkpoints.get(found.value.candidate_sha256, ""), found) for found in others]


def _costs(artifacts: Artifacts) -> Iterator[tuple[str, BenchRow]]:
    """What was timed, with the hash of the model: by `bench`, and by `verify`, the reference before the candidate."""
    for bench in artifacts.benches:
        models = bench.value.models
        yield from ((models[row.model], row) for row in bench.value.rows if row.model in models)
    for report in (found.value for found in artifacts.parities):
        names = dict.fromkeys(row.model for row in report.cost)
        hashes = dict(zip(names, (report.reference_sha256, report.candidate_sha256), strict=False))
        yield from ((hashes[row.model], row) for row in report.cost if row.model in hashes)


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
    return plan.criterion if drops(plan) else UNPRUNED


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
