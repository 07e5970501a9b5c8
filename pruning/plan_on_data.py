"""Plan on data: from a checkpoint and task data, by search, by merging, or in rounds of pruning and looking again.

Once experts are gone, others take their tokens, and what was ranked before holds no more. MC-Suite,
https://arxiv.org/abs/2504.05586, found that looking again pays where many experts go.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models.checkpoints import load_model
from models.moe_layers import find_moe_layers
from moe_spec.calibration import Progress
from moe_spec.dataset import Dataset, load_dataset
from moe_spec.errors import UserError, did_you_mean
from moe_spec.feasibility import ANY
from moe_spec.files import refuse_existing
from moe_spec.images import ImagePreprocessor
from moe_spec.plan import ROWS, LayerPlan, PruningPlan
from moe_spec.statistics import Statistics
from pruning.apply import apply_plan
from pruning.budget import SCOPES, Keep, RankedLayer
from pruning.collect import collect
from pruning.criteria import CRITERIA, by_statistics
from pruning.criteria.moments import SHAPE
from pruning.inputs import check_inputs, tensors_of
from pruning.layers import LayerShape, of_checkpoint, shapes_of
from pruning.merging.mergers import MERGERS
from pruning.plan import PlanOptions, candidates_of, check_options, choose, unranked
from pruning.reconstruction import check_search, search_model

NAEE = "naee"

Batches = Callable[[], Iterator[dict[str, torch.Tensor]]]
"""The calibration data from its start, as often as it is called."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How the data is looked at.

    Attributes:
        rounds: of pruning and looking again; every round drops as many experts.
        batch_size: examples a forward pass.
        limit: use only the first so many examples.
    """

    rounds: int = 1
    batch_size: int = 32
    limit: int | None = None


def plan_on_data(
    checkpoint: Path,
    data: Path,
    options: PlanOptions,
    out: Path,
    how: DataOptions = DataOptions(),
    on_progress: Progress | None = None,
) -> PruningPlan:
    """Choose the experts that stay, and write plan.json.

    Args:
        checkpoint: transformers directory of a known MoE family; it stays as it is.
        data: .npz of model inputs or of images (``moe_spec.dataset``); labels are not used.
        options: budget, and a criterion that ranks by statistics, or one of ``pruning.merging``, or ``naee``
            (`pruning.reconstruction`).
        out: plan to write; must not exist.
        how: see ``DataOptions``.
        on_progress: called with the examples done and the examples in all, of all rounds.

    Raises:
        UserError: ``out`` exists, checkpoint or data cannot be read or do not fit together, options that exclude each
            other, or a budget that a router cannot work with.
    """
    refuse_existing(out)
    _check(options, how)
    source = of_checkpoint(checkpoint)
    keeps = _check_layers(source.layers, options, how)
    dataset = load_dataset(data, ImagePreprocessor.load(checkpoint), limit=how.limit)
    model = load_model(checkpoint)
    check_inputs(dataset.feeds, model, str(data))
    batches = _batches(model, dataset, how, on_progress)
    plan = PruningPlan(
        model_sha256=source.model_sha256,
        criterion=options.criterion,
        options=options.recorded() | {"rounds": how.rounds, "data_sha256": dataset.sha256},
        layers=_layers(model, batches, options, keeps),
    )
    plan.save(out)
    return plan


def _check(options: PlanOptions, how: DataOptions) -> None:
    check_options(options)
    if options.criterion not in (NAEE, *MERGERS) and by_statistics(options.criterion) is None:
        raise UserError(
            f"criterion {options.criterion!r} does not look at data",
            hint=did_you_mean(options.criterion, [NAEE, *CRITERIA, SHAPE, *MERGERS]),
        )
    if how.rounds < 1:
        raise UserError(f"--rounds {how.rounds} is no number of rounds", hint="give 1 or more")
    if options.criterion in MERGERS and how.rounds > 1:
        raise UserError(
            f"criterion {options.criterion!r} merges experts, which is done in one round", hint="leave out --rounds"
        )
    if options.criterion == NAEE and (how.rounds > 1 or options.clamp_top_k):
        raise UserError(
            "criterion 'naee' searches once, for the K of the model", hint="leave out --rounds and --clamp-top-k"
        )
    several = options.criterion == NAEE or how.rounds > 1
    if several and (options.scope != "layer" or options.router != ROWS):
        raise UserError(
            f"--scope {options.scope} --router {options.router} cannot be searched for or come to in rounds",
            hint="leave them out: every layer keeps as many, and the rows of dropped experts go",
        )


def _check_layers(shapes: Sequence[LayerShape], options: PlanOptions, how: DataOptions) -> list[Keep]:
    """What is kept after each round, once it is clear that routers, floor and target can work with it."""
    layers = unranked(shapes, options)
    if options.criterion == NAEE:
        for shape, layer in zip(shapes, layers, strict=True):
            check_search(shape, layer.count(options.keep))
    SCOPES[options.scope].check(layers, options.keep)
    return _counts(layers, options.keep, how.rounds)


def _layers(
    model: PreTrainedModel, batches: Batches, options: PlanOptions, keeps: Sequence[Keep]
) -> tuple[LayerPlan, ...]:
    if options.criterion == NAEE:
        return _search(model, batches, options)
    if merger := MERGERS.get(options.criterion):
        seen = Statistics("", (), collect(model, batches(), dense=merger.dense))
        return choose(candidates_of(seen, options, merger.scores), options)
    return _rounds(model, batches, options, keeps)


def _search(model: PreTrainedModel, batches: Batches, options: PlanOptions) -> tuple[LayerPlan, ...]:
    layers = unranked(shapes_of(find_moe_layers(model)), options)
    found = search_model(model, batches(), [layer.count(options.keep) for layer in layers])
    return tuple(
        LayerPlan(layer.name, layer.experts, layer.top_k, one.keep, one.scores)
        for layer, one in zip(layers, found, strict=True)
    )


def _rounds(
    model: PreTrainedModel, batches: Batches, options: PlanOptions, keeps: Sequence[Keep]
) -> tuple[LayerPlan, ...]:
    """Prune ``model`` in place, a part in each round; the ids that stay are those of the model as it was."""
    criterion = by_statistics(options.criterion)
    assert criterion is not None
    parents = find_moe_layers(model)
    kept = {layer.name: tuple(range(layer.num_experts)) for layer in parents}
    plans: tuple[LayerPlan, ...] = ()
    for keep in keeps:
        kernels = options.kernels if keep == keeps[-1] else ANY  # what is left in between runs nowhere else
        step = dataclasses.replace(options, keep=keep, kernels=kernels)
        seen = Statistics("", (), collect(model, batches()))
        plans = choose(candidates_of(seen, options, criterion), step)
        apply_plan(model, PruningPlan("", options.criterion, plans))
        kept = {plan.name: tuple(kept[plan.name][expert] for expert in plan.keep) for plan in plans}
    if len(keeps) == 1:
        return plans
    return tuple(
        LayerPlan(plan.name, parent.num_experts, plan.top_k, kept[plan.name], groups=parent.groups)
        for parent, plan in zip(parents, plans, strict=True)
    )


def _counts(layers: Sequence[RankedLayer], keep: Keep, rounds: int) -> list[Keep]:
    """How many experts a layer keeps after each round."""
    if rounds == 1:
        return [keep]
    shapes = {(layer.experts, layer.step) for layer in layers}
    if len(shapes) > 1:
        raise UserError(
            f"layers of {sorted(count for count, _ in shapes)} experts cannot lose them in the same rounds",
            hint="plan in one round: leave out --rounds",
        )
    ((experts, step),) = shapes
    last = layers[0].count(keep)
    between = [experts - (experts - last) * done // rounds for done in range(1, rounds)]
    return [*(-(-count // step) * step for count in between), last]


def _batches(model: PreTrainedModel, dataset: Dataset, how: DataOptions, on_progress: Progress | None) -> Batches:
    done = 0

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal done
        for feeds in dataset.batches(how.batch_size):
            yield tensors_of(feeds, model.dtype)
            done += len(next(iter(feeds.values())))
            if on_progress is not None:
                on_progress(done, how.rounds * len(dataset))

    return batches
