"""Plan: rank the experts of every layer by a criterion and keep what the budget allows."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from moe_spec.errors import UserError, did_you_mean
from moe_spec.files import refuse_existing, sha256_file
from moe_spec.plan import PruningPlan
from moe_spec.statistics import LayerStatistics, Statistics
from pruning.budget import SCOPES, Keep, RankedLayer, check_budget
from pruning.criteria import CRITERIA, DATA_FREE_CRITERIA
from pruning.layers import LayerShape, ModelLayers, of_checkpoint

LayersOf = Callable[[Path], ModelLayers]

STATISTICS_SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What to keep.

    Attributes:
        keep: experts a layer keeps: a count (int), or a share (float above 0 and at most 1).
        criterion: a name in ``pruning.criteria``.
        scope: ``layer`` (the same count everywhere) or ``global`` (one ranking over all layers).
        seed: of the criterion ``random``.
        clamp_top_k: let K shrink where fewer than K experts can be selected.
    """

    keep: Keep
    criterion: str = "reap"
    scope: str = "layer"
    seed: int = 0
    clamp_top_k: bool = False


def plan(source: Path, options: PlanOptions, out: Path, layers_of: LayersOf = of_checkpoint) -> PruningPlan:
    """Write plan.json; see ``make_plan``.

    Raises:
        UserError: ``out`` exists, or what ``make_plan`` raises.
    """
    refuse_existing(out)
    made = make_plan(source, options, layers_of)
    made.save(out)
    return made


def make_plan(source: Path, options: PlanOptions, layers_of: LayersOf = of_checkpoint) -> PruningPlan:
    """Choose the experts that stay.

    Args:
        source: statistics.safetensors; for criteria that need none also a model.
        options: criterion and budget.
        layers_of: reads the layers of a model; that of ONNX models is injected by whoever has graph_passes.

    Raises:
        UserError: ``source`` cannot be read or does not suit the criterion, an unknown criterion or scope, a budget
            that is none, or one that a router cannot work with.
    """
    check_budget(options.keep, str(options.keep))
    _known(options.criterion, "criterion", [*CRITERIA, *DATA_FREE_CRITERIA])
    _known(options.scope, "scope", SCOPES)
    statistics_sha256 = None
    if options.criterion in CRITERIA:
        model_sha256, ranked = _rank(_statistics(source, options.criterion), options.criterion)
        statistics_sha256 = sha256_file(source)
    else:
        model_sha256, ranked = _rank_without_data(source, options, layers_of)
    counts = SCOPES[options.scope](ranked, options.keep, options.clamp_top_k)
    return PruningPlan(
        model_sha256=model_sha256,
        criterion=options.criterion,
        options={key: value for key, value in dataclasses.asdict(options).items() if key != "criterion"},
        statistics_sha256=statistics_sha256,
        layers=tuple(layer.plan(count, options.clamp_top_k) for layer, count in zip(ranked, counts, strict=True)),
    )


def _rank(statistics: Statistics, criterion: str) -> tuple[str, list[RankedLayer]]:
    ranked = [
        RankedLayer(layer.name, layer.top_k, layer.groups, CRITERIA[criterion](layer)) for layer in statistics.layers
    ]
    for layer in ranked:
        if not np.isfinite(layer.scores).all():
            raise UserError(
                f"the statistics of layer {layer.name} are not finite: the model overflowed on the calibration data",
                hint="calibrate again, with data that the model can take",
            )
    return statistics.model_sha256, ranked


def _rank_without_data(source: Path, options: PlanOptions, layers_of: LayersOf) -> tuple[str, list[RankedLayer]]:
    """Layers of a model, or of statistics, ranked by a criterion that looks at neither."""
    score, generator = DATA_FREE_CRITERIA[options.criterion], np.random.default_rng(options.seed)
    if source.suffix == STATISTICS_SUFFIX:
        statistics = Statistics.load(source)
        identity = statistics.model_sha256
        shapes: Sequence[LayerStatistics | LayerShape] = statistics.layers
    else:
        model = layers_of(source)
        identity, shapes = model.model_sha256, model.layers
    ranked = [RankedLayer(shape.name, shape.top_k, shape.groups, score(shape.experts, generator)) for shape in shapes]
    return identity, ranked


def _statistics(source: Path, criterion: str) -> Statistics:
    if source.is_dir() or source.suffix == ".onnx":
        raise UserError(
            f"criterion {criterion!r} ranks by statistics, but {source} is a model",
            hint=f"moe-edge calibrate {source} --data DATA.npz -o statistics.safetensors, and plan with that; "
            "without data: --criterion random, or --experts",
        )
    return Statistics.load(source)


def _known(name: str, what: str, known: Collection[str]) -> None:
    if name not in known:
        raise UserError(f"{name!r} is no {what}", hint=did_you_mean(name, known))
