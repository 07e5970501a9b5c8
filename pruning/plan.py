"""Plan: rank the experts of every layer by a criterion and keep what the budget allows."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_spec.errors import UserError, require_known
from moe_spec.feasibility import ANY, Kernels
from moe_spec.files import refuse_existing, sha256_file
from moe_spec.identity import checkpoint_sha256, is_onnx
from moe_spec.means import means_path
from moe_spec.plan import ALIAS, FULL, REPLACE, ROWS, UNTOUCHED, LayerPlan, PruningPlan
from moe_spec.statistics import LayerStatistics, Statistics
from pruning.budget import SCOPES, SEARCHED, Keep, RankedLayer, check_budget, check_clamp, check_router
from pruning.criteria import (
    CHANGE_CRITERIA,
    CRITERIA,
    DATA_FREE_CRITERIA,
    WEIGHT_CRITERIA,
    Criterion,
    Scores,
    by_statistics,
)
from pruning.criteria.moments import SHAPE
from pruning.criteria.protection import super_experts
from pruning.criteria.scores import finite
from pruning.layers import LayerShape, ModelLayers, of_checkpoint
from pruning.means import check_replaceable, with_means
from pruning.merging.mergers import MERGERS
from pruning.merging.plan import check_merging, merge_instead, parts_of

LayersOf = Callable[..., ModelLayers]
"""``layers_of(model, trust_remote_code=...)``."""

STATISTICS_SUFFIX = ".safetensors"

PUBLISHED: Mapping[str, str] = {"mone": REPLACE}
"""Routers of criteria that remove no rows in their papers, unless the user says otherwise."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What to keep.

    Attributes:
        keep: experts a layer keeps: a count (int), or a share (float above 0 and at most 1).
        criterion: a name in ``pruning.criteria``, or ``s(b,alpha,beta)``; or one of ``pruning.merging``, which merges
            experts into as many as it would keep.
        scope: ``layer`` (the same count everywhere) or ``global`` (one ranking over all layers); with data also
            ``searched`` (what changes least of what the model says).
        seed: of the criterion ``random``, and of routers that are drawn anew.
        clamp_top_k: let K shrink where fewer than K experts can be selected.
        router: ``rows`` (a token that chose a dropped expert gets its next best survivor), ``full`` (it gets nothing
            from it; K stays, and fewer than K experts may be kept) or ``replace`` (as ``full``, but it gets the
            expert's mean output). Where experts are merged ``rows``, ``mean``, ``new`` or ``alias`` of
            ``moe_spec.plan.ROUTERS``. Empty is ``rows``, or what is nearest to the paper of ``mone`` and of mergers.
        protect: keep super experts (``pruning.criteria.protection``) before all others.
        pretrained: the checkpoint before fine-tuning, for criteria that compare with it; plans hold its hash.
        floor: experts that every layer keeps at least.
        kernels: what the target takes; a share is rounded to it, a count that it does not take is refused.
    """

    keep: Keep
    criterion: str = "reap"
    scope: str = "layer"
    seed: int = 0
    clamp_top_k: bool = False
    router: str = ""
    protect: bool = False
    pretrained: Path | None = None
    floor: int = 1
    kernels: Kernels = ANY

    def __post_init__(self) -> None:
        if not self.router:
            own = MERGERS[self.criterion].router if self.criterion in MERGERS else PUBLISHED.get(self.criterion, ROWS)
            object.__setattr__(self, "router", own)

    def recorded(self) -> dict[str, Any]:
        """As they stand in plan.json. A path says nothing elsewhere, so the hash of what it leads to does."""
        recorded = dataclasses.asdict(self) | {
            "pretrained": self.pretrained and checkpoint_sha256(self.pretrained),
            "target": self.kernels.target or None,
        }
        return {key: value for key, value in recorded.items() if key not in ("criterion", "kernels")}


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


def plan(
    source: Path,
    options: PlanOptions,
    out: Path,
    layers_of: LayersOf = of_checkpoint,
    *,
    trust_remote_code: bool = False,
) -> PruningPlan:
    """Write plan.json; see ``make_plan``.

    Raises:
        UserError: ``out`` exists, or what ``make_plan`` raises.
    """
    refuse_existing_plan(out)
    made = make_plan(source, options, layers_of, trust_remote_code=trust_remote_code)
    made.save(out)
    return made


def refuse_existing_plan(out: Path) -> None:
    """Checked before any work starts.

    Raises:
        UserError: ``out`` exists, or the file that may have to stand beside it.
    """
    refuse_existing(out)
    refuse_existing(means_path(out))


def make_plan(
    source: Path, options: PlanOptions, layers_of: LayersOf = of_checkpoint, *, trust_remote_code: bool = False
) -> PruningPlan:
    """Choose the experts that stay. What cannot be is refused before anything is ranked.

    Args:
        source: statistics.safetensors; for criteria that need none a model, which has to be a checkpoint where they
            read weights.
        options: criterion and budget.
        layers_of: reads the layers of a model; that of ONNX models is injected by whoever has graph_passes.
        trust_remote_code: run the Python files that a checkpoint's config.json names (`models.own_code`).

    Raises:
        UserError: ``source`` cannot be read or does not suit the criterion, options that are unknown or exclude each
            other, a budget that is none, or one that a router cannot work with.
    """
    check_options(options)
    if options.scope == SEARCHED:
        raise UserError(
            "--scope searched tries plans on data, and there is none",
            hint="moe-edge plan CHECKPOINT --data DATA.npz --scope searched",
        )
    candidates = _candidates(source, options, layers_of, trust_remote_code=trust_remote_code)
    layers = choose(candidates, options)
    return PruningPlan(
        model_sha256=candidates.model_sha256,
        criterion=options.criterion,
        options=options.recorded(),
        statistics_sha256=candidates.statistics_sha256,
        layers=layers,
    )


def choose(candidates: Candidates, options: PlanOptions) -> tuple[LayerPlan, ...]:
    """Spend the budget on ranked layers.

    Raises:
        UserError: a budget that a router cannot work with, or nothing that tells what dropped experts gave where that
            is to take their place; both checked before anything is ranked.
    """
    if options.router == REPLACE:
        check_replaceable(candidates.layers)
    scope = SCOPES[options.scope]
    check_counts(unranked(candidates.layers, options, candidates.protected), options)
    ranked = rank(candidates.layers, candidates.score(), options, candidates.protected)
    counts = scope.spread(ranked, options.keep)
    plans = tuple(layer.plan(count) for layer, count in zip(ranked, counts, strict=True))
    if options.router == REPLACE:
        return replaced(plans, candidates)
    merger = MERGERS.get(options.criterion)
    if merger is None:
        return plans
    seen = [layer for layer in candidates.layers if isinstance(layer, LayerStatistics)]
    return tuple(merge_instead(plan, layer, merger, options.router) for plan, layer in zip(plans, seen, strict=True))


def check_counts(layers: Sequence[RankedLayer], options: PlanOptions) -> None:
    """Refuse a budget that ``layers``, all of whose scores are 0, cannot work with; then no scores make it possible.

    Raises:
        UserError: what the scope refuses, or routing groups that experts cannot be merged in.
    """
    counts = SCOPES[options.scope].spread(layers, options.keep)
    if options.criterion in MERGERS:
        for layer, count in zip(layers, counts, strict=True):
            parts_of(layer.name, layer.groups, count, options.router)


def replaced(plans: Sequence[LayerPlan], candidates: Candidates) -> tuple[LayerPlan, ...]:
    """``plans`` with the mean outputs that take the place of dropped experts.

    Raises:
        UserError: the statistics do not tell them.
    """
    seen = [layer for layer in candidates.layers if isinstance(layer, LayerStatistics)]
    return tuple(with_means(plan, layer) for plan, layer in zip(plans, seen, strict=True))


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


def check_options(options: PlanOptions) -> None:
    """Refuse options that no criterion could be planned with.

    Raises:
        UserError: a budget that is none, an unknown scope or router, or options that exclude each other.
    """
    check_budget(options.keep, str(options.keep))
    require_known(options.scope, "scope", [*SCOPES, SEARCHED])
    if options.kernels.counts and (options.scope != "layer" or options.router in UNTOUCHED):
        raise UserError(
            f"--scope {options.scope} --router {options.router} cannot be had on target {options.kernels.target}: it "
            "builds from a checkpoint, where every layer has as many experts, and its router as many rows",
            hint="plan with --scope layer --router rows, or choose another --target",
        )
    if options.criterion in MERGERS:
        check_merging(options.criterion, options.router, protect=options.protect)
        check_clamp(options.router, clamp_top_k=options.clamp_top_k)
    else:
        check_router(options.router, clamp_top_k=options.clamp_top_k)
    if options.pretrained is not None and options.criterion not in CHANGE_CRITERIA:
        raise UserError(
            f"criterion {options.criterion!r} compares with no other checkpoint",
            hint=f"leave out --pretrained; it is for --criterion {' or '.join(CHANGE_CRITERIA)}",
        )


def _candidates(source: Path, options: PlanOptions, layers_of: LayersOf, *, trust_remote_code: bool) -> Candidates:
    if merger := MERGERS.get(options.criterion):
        return _by_statistics(source, options, merger.scores)
    if criterion := by_statistics(options.criterion):
        return _by_statistics(source, options, criterion)
    without_statistics = [*DATA_FREE_CRITERIA, *WEIGHT_CRITERIA, *CHANGE_CRITERIA]
    require_known(options.criterion, "criterion", [*CRITERIA, SHAPE, *MERGERS, *without_statistics])
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
