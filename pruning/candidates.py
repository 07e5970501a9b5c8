"""The layers of a model before they are ranked, and by what they will be: statistics, weights, or chance."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moe_spec.errors import UserError, require_known
from moe_spec.files import sha256_file
from moe_spec.identity import is_onnx
from moe_spec.layer_plan import ALIAS, FULL, ROWS
from moe_spec.statistics import LayerStatistics, Statistics
from pruning.budget.ranked import RankedLayer
from pruning.criteria import (
    CHANGE_CRITERIA,
    CRITERIA,
    DATA_FREE_CRITERIA,
    NAEE,
    WEIGHT_CRITERIA,
    Criterion,
    Scores,
    by_statistics,
)
from pruning.criteria.moments import SHAPE
from pruning.criteria.protection import super_experts
from pruning.criteria.scores import finite
from pruning.layers import LayerShape, ModelLayers, of_checkpoint
from pruning.merging.mergers import MERGERS
from pruning.options import PlanOptions

LayersOf = Callable[..., ModelLayers]
"""``layers_of(model, trust_remote_code=...)``."""

STATISTICS_SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The layers of a model before they are ranked.

    Attributes:
        model_sha256: identity of the model.
        layers: their names and counts.
        score: (E,) for each of them. What it reads, it reads when it is called.
        statistics_sha256: of the statistics that it ranks by, if it does.
        protected: for each layer the ids that stay, or nothing at all.
    """

    model_sha256: str
    layers: Sequence[LayerShape | LayerStatistics]
    score: Callable[[], list[Scores]]
    statistics_sha256: str | None = None
    protected: Sequence[frozenset[int]] = ()


def rank(
    layers: Sequence[LayerShape | LayerStatistics],
    scores: Sequence[Scores],
    options: PlanOptions,
    protected: Sequence[frozenset[int]] = (),
) -> list[RankedLayer]:
    """``layers`` with the ``scores`` of their experts, (E,) each, and all that binds how many they may keep."""
    router = options.router
    if options.criterion in MERGERS:
        router = FULL if router == ALIAS else ROWS  # what binds how many there may be
    return [
        RankedLayer(
            name=shape.name,
            top_k=shape.top_k,
            groups=shape.groups,
            scores=scores_E,
            clamp_top_k=options.clamp_top_k,
            router=router,
            protected=ids,
            floor=options.floor,
            kernels=options.kernels,
            expert_choice=isinstance(shape, LayerShape) and shape.expert_choice,
        )
        for shape, scores_E, ids in zip(layers, scores, protected or [frozenset()] * len(scores), strict=True)
    ]


def unranked(
    layers: Sequence[LayerShape | LayerStatistics], options: PlanOptions, protected: Sequence[frozenset[int]] = ()
) -> list[RankedLayer]:
    """``layers`` with scores of 0: all that has to be known to tell whether a budget can be."""
    return rank(layers, [np.zeros(shape.experts) for shape in layers], options, protected)


def find_candidates(source: Path, options: PlanOptions, layers_of: LayersOf, *, trust_remote_code: bool) -> Candidates:
    """The layers that ``source`` holds or was taken of, to be ranked by the criterion of ``options``.

    Raises:
        UserError: ``source`` cannot be read or does not suit the criterion, which may be unknown.
    """
    if merger := MERGERS.get(options.criterion):
        return _by_statistics(source, options, merger.scores)
    if criterion := by_statistics(options.criterion):
        return _by_statistics(source, options, criterion)
    without_statistics = [*DATA_FREE_CRITERIA, *WEIGHT_CRITERIA, *CHANGE_CRITERIA]
    require_known(options.criterion, "criterion", [*CRITERIA, SHAPE, *MERGERS, *without_statistics, NAEE])
    if options.criterion == NAEE:
        raise UserError(
            "criterion 'naee' searches on data, and there is none",
            hint="moe-edge plan CHECKPOINT --data DATA.npz --criterion naee",
        )
    if options.protect:
        raise UserError(
            f"--protect finds super experts in statistics, but criterion {options.criterion!r} takes none",
            hint="rank by statistics, or leave out --protect",
        )
    if options.criterion in DATA_FREE_CRITERIA:
        return _at_random(source, options, functools.partial(layers_of, trust_remote_code=trust_remote_code))
    return _by_weights(source, options, trust_remote_code=trust_remote_code)


def _by_statistics(source: Path, options: PlanOptions, criterion: Criterion) -> Candidates:
    if source.is_dir() or source.suffix == ".onnx":
        without = "random" if is_onnx(source) else "aimer or random"
        raise UserError(
            f"criterion {options.criterion!r} ranks by statistics, but {source} is a model",
            hint=f"moe-edge calibrate {source} --data DATA.npz -o statistics.safetensors, and plan with that; "
            f"without data: --criterion {without}, or --experts",
        )
    return candidates_of(Statistics.load(source), options, criterion, sha256_file(source))


def candidates_of(
    statistics: Statistics, options: PlanOptions, criterion: Criterion, statistics_sha256: str | None = None
) -> Candidates:
    """The layers of ``statistics``, to be ranked by ``criterion``.

    Raises:
        UserError: super experts shall be kept, and the statistics do not tell them.
    """
    return Candidates(
        statistics.model_sha256,
        statistics.layers,
        lambda: [finite(layer.name, criterion(layer)) for layer in statistics.layers],
        statistics_sha256,
        super_experts(statistics.layers) if options.protect else (),
    )


def _at_random(source: Path, options: PlanOptions, layers_of: LayersOf) -> Candidates:
    """Layers of a model, or of statistics, of which the criterion looks at the counts only."""
    score, generator = DATA_FREE_CRITERIA[options.criterion], np.random.default_rng(options.seed)
    model = Statistics.load(source) if source.suffix == STATISTICS_SUFFIX else layers_of(source)
    return Candidates(
        model.model_sha256, model.layers, lambda: [score(layer.experts, generator) for layer in model.layers]
    )


def _by_weights(checkpoint: Path, options: PlanOptions, *, trust_remote_code: bool) -> Candidates:
    criterion, pretrained = options.criterion, options.pretrained
    if options.scope != "layer":
        raise UserError(f"criterion {criterion!r} ranks within a layer only", hint="plan with --scope layer")
    score: Callable[[], list[Scores]]
    if criterion in WEIGHT_CRITERIA:
        score = functools.partial(WEIGHT_CRITERIA[criterion], checkpoint, trust_remote_code=trust_remote_code)
    elif pretrained is not None:
        score = functools.partial(
            CHANGE_CRITERIA[criterion], checkpoint, pretrained, trust_remote_code=trust_remote_code
        )
    else:
        raise UserError(
            f"criterion {criterion!r} compares a checkpoint with the one that it was fine-tuned from",
            hint="name that: --pretrained CHECKPOINT",
        )
    model = of_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    return Candidates(model.model_sha256, model.layers, score)
