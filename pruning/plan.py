"""Plan: rank the experts of every layer by a criterion and keep what the budget allows."""

from collections.abc import Sequence
from pathlib import Path

from moe_spec.errors import UserError
from moe_spec.files import refuse_existing
from moe_spec.layer_plan import REPLACE, LayerPlan
from moe_spec.means import means_path
from moe_spec.plan import PruningPlan
from moe_spec.statistics import LayerStatistics
from pruning.budget.ranked import RankedLayer
from pruning.budget.scopes import SCOPES, SEARCHED
from pruning.candidates import Candidates, LayersOf, find_candidates, rank, unranked
from pruning.layers import of_checkpoint
from pruning.means import check_replaceable, with_means
from pruning.merging.mergers import MERGERS
from pruning.merging.plan import check_capacity, merge_instead, parts_of
from pruning.options import PlanOptions, check_options


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
    candidates = find_candidates(source, options, layers_of, trust_remote_code=trust_remote_code)
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
        UserError: what the scope refuses, or groups that experts cannot be merged in.
    """
    counts = SCOPES[options.scope].spread(layers, options.keep)
    if merger := MERGERS.get(options.criterion):
        for layer, count in zip(layers, counts, strict=True):
            parts_of(layer.name, layer.groups, count, options.router)
            if options.scope == "layer":  # else scores decide who has how many
                check_capacity(layer.name, layer.experts, count, merger, options.router)


def replaced(plans: Sequence[LayerPlan], candidates: Candidates) -> tuple[LayerPlan, ...]:
    """``plans`` with the mean outputs that take the place of dropped experts.

    Raises:
        UserError: the statistics do not tell them.
    """
    seen = [layer for layer in candidates.layers if isinstance(layer, LayerStatistics)]
    return tuple(with_means(plan, layer) for plan, layer in zip(plans, seen, strict=True))
