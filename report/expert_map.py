"""Which experts stay: layers by experts, with the numbers behind each choice."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from report.artifacts import Artifacts, folder_of
from report.lineage import drops
from report.variants import Variant
from runtime.verification.report import LayerParity

STEPS = 8
"""Shades of a colour scale."""
MOST_CELLS = 40_000
"""Of all maps together; more would make the page too large to open at ease."""


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """One MoE layer of a plan; every list has E entries, or none where it is not known.

    Attributes:
        name: of the layer.
        kept: whether each expert stays.
        scores: what the criterion gave; higher is kept.
        before: share of the choices of the unpruned model's router that fell on each expert, on calibration data.
        after: likewise of the pruned model, on the data that it was verified with.
    """

    name: str
    kept: tuple[bool, ...]
    scores: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]

    def shades(self) -> Mapping[str, tuple[int, ...]]:
        """For each number the shade of each expert, 0 to `STEPS` - 1.

        Scores go from the layer's lowest to its highest. Shares go from none to twice an even share, so that the middle
        is even.
        """
        low, high = min(self.scores, default=0.0), max(self.scores, default=0.0)
        even = 2 / max(len(self.kept), 1)
        return {
            "score": tuple(_shade((score - low) / (high - low or 1.0)) for score in self.scores),
            "before": tuple(_shade(share / even) for share in self.before),
            "after": tuple(_shade(share / even) for share in self.after),
        }


def _shade(value: float) -> int:
    """Of a value between 0 and 1.

    >>> _shade(0.0), _shade(0.5), _shade(1.7)
    (0, 4, 7)
    """
    return min(max(int(value * STEPS), 0), STEPS - 1) if value == value else 0


@dataclasses.dataclass(frozen=True)
class ExpertMap:
    """A plan.

    Attributes:
        label: of the variants that it was applied to, or the plan's own path.
        criterion: what ranked.
        router: what becomes of routers.
        layers: in model order.
    """

    label: str
    criterion: str
    router: str
    layers: tuple[LayerMap, ...]

    @property
    def experts(self) -> int:
        """The most that a layer had."""
        return max((len(layer.kept) for layer in self.layers), default=0)

    @property
    def cells(self) -> int:
        """Experts of all layers."""
        return sum(len(layer.kept) for layer in self.layers)

    @property
    def kept(self) -> int:
        """Experts that stay, of all layers."""
        return sum(sum(layer.kept) for layer in self.layers)

    @property
    def has(self) -> tuple[str, ...]:
        """The numbers that there are: ``score``, ``before``, ``after``."""
        known = {
            "score": any(layer.scores for layer in self.layers),
            "before": any(layer.before for layer in self.layers),
            "after": any(layer.after for layer in self.layers),
        }
        return tuple(name for name, is_known in known.items() if is_known)


def expert_maps(artifacts: Artifacts, variants: Sequence[Variant]) -> tuple[ExpertMap, ...]:
    """A map for each plan that drops something, the one that keeps most first."""
    maps = [
        ExpertMap(
            label=label,
            criterion=plan.criterion,
            router="+".join(sorted({layer.router for layer in plan.layers})),
            layers=tuple(_layers(plan, artifacts, variants)),
        )
        for label, plan in _plans(artifacts, variants)
        if drops(plan)
    ]
    return tuple(sorted(maps, key=lambda found: -found.kept))


def shown(maps: Sequence[ExpertMap]) -> tuple[ExpertMap, ...]:
    """The first of ``maps``, as many as a page holds."""
    room, fitting = MOST_CELLS, []
    for one in maps:
        room -= one.cells
        if room >= 0:
            fitting.append(one)
    return tuple(fitting)


def _plans(artifacts: Artifacts, variants: Sequence[Variant]) -> Iterator[tuple[str, PruningPlan]]:
    """Each plan once, by the name of what came of it."""
    seen: list[PruningPlan] = []
    for variant in variants:
        plan = variant.model.value.plan
        if plan is not None and plan not in seen:
            seen.append(plan)
            yield variant.label, plan
    trained = {checkpoint.path: checkpoint.sha256 for checkpoint in artifacts.checkpoints}
    for found in artifacts.plans:
        if found.value not in seen:
            seen.append(found.value)
            source = trained.get(folder_of(found.path))  # of what `finetune` pruned
            labels = [variant.label for variant in variants if variant.model.value.source_sha256 == source]
            yield labels[0] if labels else found.path, found.value


def _layers(plan: PruningPlan, artifacts: Artifacts, variants: Sequence[Variant]) -> Iterator[LayerMap]:
    before, after = _usage_before(plan, artifacts), _usage_after(plan, variants)
    for layer in plan.layers:
        yield LayerMap(
            name=layer.name,
            kept=tuple(expert in layer.keep for expert in range(layer.experts)),
            scores=layer.scores,
            before=_shares(before.get(layer.name, ()), layer),
            after=_shares(after.get(layer.name, ()), layer),
        )


def _usage_before(plan: PruningPlan, artifacts: Artifacts) -> dict[str, Sequence[float]]:
    """Tokens of each expert in the statistics that ranked, or in others of the same model."""
    of_model = [found for found in artifacts.statistics if found.value.model_sha256 == plan.model_sha256]
    ranked = [found for found in of_model if found.sha256 == plan.statistics_sha256]
    chosen = (ranked or of_model)[:1]
    return {
        layer.name: layer.sums["tokens"].tolist()
        for found in chosen
        for layer in found.value.layers
        if "tokens" in layer.sums
    }


def _usage_after(plan: PruningPlan, variants: Sequence[Variant]) -> dict[str, Sequence[float]]:
    reports = (report.value for variant in variants if variant.model.value.plan == plan for report in variant.parities)
    seen: Sequence[LayerParity] = next((report.layers for report in reports if report.layers), ())
    return {layer.name: layer.usage for layer in seen}


def _shares(counts: Sequence[float], layer: LayerPlan) -> tuple[float, ...]:
    """Shares of 1; nothing where the counts are of another number of experts, or none was chosen."""
    total = sum(counts)
    padded = (*counts, *(0.0 for _ in range(layer.experts - len(counts))))  # experts behind the last one kept
    return tuple(count / total for count in padded) if total > 0 and len(padded) == layer.experts else ()
