"""Plan on data: from a checkpoint and task data, by search, by merging, in rounds of pruning and looking again.

Once experts are gone, others take their tokens, and what was ranked before holds no more. MC-Suite,
https://arxiv.org/abs/2504.05586, found that looking again pays where many experts go.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models.checkpoints import load_model, load_skeleton
from models.moe_layers import find_moe_layers, require_token_choice
from moe_spec.dataset import Dataset, load_dataset
from moe_spec.errors import UserError, did_you_mean
from moe_spec.feasibility import ANY
from moe_spec.layer_plan import REPLACE, ROWS, UNTOUCHED, LayerPlan
from moe_spec.plan import BYTES, PruningPlan
from moe_spec.progress import Progress, silent
from moe_spec.statistics import Statistics
from pruning.apply import apply_plan
from pruning.budget.acceptance import Batches
from pruning.budget.cost import Measure
from pruning.budget.keep import Keep
from pruning.budget.limit import FLAGS, AtMost, Limit
from pruning.budget.ranked import RankedLayer
from pruning.budget.scopes import SEARCHED
from pruning.budget.spend import Outcome, limit_of, spend
from pruning.candidates import candidates_of, rank, unranked
from pruning.collect import collect
from pruning.criteria import CRITERIA, NAEE, by_statistics
from pruning.criteria.moments import SHAPE
from pruning.finetuning.examples import is_language_model
from pruning.inputs import check_inputs, tensors_of
from pruning.layers import LayerShape, of_checkpoint, shapes_of
from pruning.merging.mergers import MERGERS
from pruning.options import PlanOptions, check_options
from pruning.plan import check_counts, choose, refuse_existing_plan, replaced
from pruning.reconstruction import check_search, search_model

Way = Callable[[PreTrainedModel, Batches], Outcome]
"""How a plan is made of a model and data."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """How the data is looked at.

    Attributes:
        rounds: of pruning and looking again; every round drops as many experts.
        batch_size: examples a forward pass.
        limit: use only the first so many examples.
        at_most: what the whole model may cost, where the options' ``keep`` is 1.0.
        trials: plans that scope ``searched`` tries.
        measure: times plans, for a budget of milliseconds; injected by whoever can export and run a model.
    """

    rounds: int = 1
    batch_size: int = 32
    limit: int | None = None
    at_most: AtMost | None = None
    trials: int = 100
    measure: Measure | None = None

    def recorded(self) -> dict[str, int | None]:
        """As they stand in plan.json; a budget stands there with what came of it."""
        return {"rounds": self.rounds, "batch_size": self.batch_size, "limit": self.limit}


def plan_on_data(
    checkpoint: Path,
    data: Path,
    options: PlanOptions,
    out: Path,
    how: DataOptions = DataOptions(),
    on_progress: Progress = silent,
    *,
    trust_remote_code: bool = False,
) -> PruningPlan:
    """Choose the experts that stay, and write plan.json.

    Args:
        checkpoint: transformers directory of a known MoE family; it stays as it is.
        data: .npz of model inputs or of images (``moe_spec.dataset``); labels are not used. The model looks at them on
            the CPU, whatever else there is.
        options: budget, and a criterion that ranks by statistics, or one of ``pruning.merging``, or ``naee``
            (`pruning.reconstruction`).
        out: plan to write; must not exist.
        how: see ``DataOptions``.
        on_progress: called with the examples done and the examples in all, of all rounds and trials.
        trust_remote_code: run the Python files that config.json names (`models.own_code`).

    Raises:
        UserError: ``out`` exists, checkpoint or data cannot be read or do not fit together, options that exclude each
            other, or a budget that a router, the floor or the target cannot work with.
    """
    refuse_existing_plan(out)
    _check(options, how)
    source = of_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    way = _way(checkpoint, source.layers, options, how, trust_remote_code=trust_remote_code)
    dataset = load_dataset(data, checkpoint, limit=how.limit)
    model = load_model(checkpoint, trust_remote_code=trust_remote_code)
    check_inputs(dataset.feeds, model, str(data))
    layers, found = way(model, _batches(model, dataset, options, how, on_progress))
    plan = PruningPlan(
        model_sha256=source.model_sha256,
        criterion=options.criterion,
        options=options.recorded() | how.recorded() | {"data_sha256": dataset.sha256, **found},
        layers=layers,
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
    if options.criterion == NAEE and options.protect:
        raise UserError(
            "--protect keeps super experts whatever they score, but criterion 'naee' ranks nothing by scores",
            hint="leave out --protect",
        )
    several = options.criterion == NAEE or how.rounds > 1
    if several and (options.scope != "layer" or options.router != ROWS):
        raise UserError(
            f"--scope {options.scope} --router {options.router} cannot be searched for or come to in rounds",
            hint="every layer keeps as many, and the rows of dropped experts go: --scope layer --router rows",
        )
    _check_budget(options, how)


def _check_budget(options: PlanOptions, how: DataOptions) -> None:
    if options.criterion in MERGERS and (options.scope == SEARCHED or how.at_most is not None):
        raise UserError(
            f"criterion {options.criterion!r} merges experts, into a number that has to be given",
            hint="give --keep, with --scope layer or global",
        )
    if options.scope == SEARCHED and options.router != ROWS:
        raise UserError(
            f"--router {options.router} cannot be searched for: what is tried has the rows of dropped experts gone",
            hint="give --router rows, or choose another --scope",
        )
    if how.at_most is not None and how.at_most.unit == BYTES and options.router in UNTOUCHED:
        raise UserError(
            f"--max-size is of a checkpoint, and none has a router that stays: {options.router}",
            hint="give --router rows, or plan with --keep",
        )
    if how.at_most is not None and (options.criterion == NAEE or how.rounds > 1 or options.keep != 1.0):
        flag = FLAGS[how.at_most.unit]
        raise UserError(
            f"{flag} is a budget of its own, spent at once",
            hint=f"leave out {flag}, or --keep, --rounds and --criterion {NAEE}",
        )
    if how.trials < 1:
        raise UserError(f"--trials {how.trials} is no number of plans to try", hint="give 1 or more")


def _way(
    checkpoint: Path,
    shapes: Sequence[LayerShape],
    options: PlanOptions,
    how: DataOptions,
    *,
    trust_remote_code: bool,
) -> Way:
    """How the plan is made, once it is clear that routers, floor, target and budget can work with it."""
    layers, skeleton = unranked(shapes, options), load_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    require_token_choice(find_moe_layers(skeleton))
    if options.scope == SEARCHED:
        is_language_model(skeleton)  # it has a head, and says something
    if options.scope == SEARCHED or how.at_most is not None:
        limit = limit_of(checkpoint, layers, options, how.at_most, how.measure, trust_remote_code=trust_remote_code)
        return functools.partial(_spend, options=options, limit=limit, trials=how.trials)
    if options.criterion == NAEE:
        for shape, layer in zip(shapes, layers, strict=True):
            check_search(shape, layer.count(options.keep))
    check_counts(layers, options)
    if options.criterion == NAEE:
        return functools.partial(_search, options=options)
    if options.criterion in MERGERS:
        return functools.partial(_merge, options=options)
    return functools.partial(_rounds, options=options, keeps=_counts(layers, options.keep, how.rounds))


def _spend(model: PreTrainedModel, batches: Batches, options: PlanOptions, limit: Limit, trials: int) -> Outcome:
    criterion = by_statistics(options.criterion)
    assert criterion is not None
    candidates = candidates_of(Statistics("", (), collect(model, batches())), options, criterion)
    ranked = rank(candidates.layers, candidates.score(), options, candidates.protected)
    plans, found = spend(model, batches, ranked, limit, options, trials)
    return replaced(plans, candidates) if options.router == REPLACE else plans, found


def _merge(model: PreTrainedModel, batches: Batches, options: PlanOptions) -> Outcome:
    merger = MERGERS[options.criterion]
    seen = Statistics("", (), collect(model, batches(), dense=merger.dense))
    return choose(candidates_of(seen, options, merger.scores), options), {}


def _search(model: PreTrainedModel, batches: Batches, options: PlanOptions) -> Outcome:
    layers = unranked(shapes_of(find_moe_layers(model)), options)
    found = search_model(model, batches(), [layer.count(options.keep) for layer in layers])
    plans = (
        LayerPlan(layer.name, layer.experts, layer.top_k, one.keep, one.scores)
        for layer, one in zip(layers, found, strict=True)
    )
    return tuple(plans), {"exact": [one.exact for one in found]}


def _rounds(model: PreTrainedModel, batches: Batches, options: PlanOptions, keeps: Sequence[Keep]) -> Outcome:
    """Prune ``model`` in place, a part between rounds; the ids that stay are those of the model as it was."""
    criterion = by_statistics(options.criterion)
    assert criterion is not None
    parents = find_moe_layers(model)
    kept = {layer.name: tuple(range(layer.num_experts)) for layer in parents}
    plans: tuple[LayerPlan, ...] = ()
    for number, keep in enumerate(keeps):
        if plans:  # of the round before; the last one is carried out elsewhere, maybe where more is possible
            apply_plan(model, PruningPlan("", options.criterion, plans))
        kernels = options.kernels if number == len(keeps) - 1 else ANY  # what is left in between runs nowhere else
        step = dataclasses.replace(options, keep=keep, kernels=kernels)
        seen = Statistics("", (), collect(model, batches()))
        plans = choose(candidates_of(seen, options, criterion), step)
        kept = {plan.name: tuple(kept[plan.name][expert] for expert in plan.keep) for plan in plans}
    if len(keeps) == 1:
        return plans, {}
    of_parents = (
        LayerPlan(plan.name, parent.num_experts, plan.top_k, kept[plan.name], groups=parent.groups)
        for parent, plan in zip(parents, plans, strict=True)
    )
    return tuple(of_parents), {}


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


def _batches(
    model: PreTrainedModel, dataset: Dataset, options: PlanOptions, how: DataOptions, on_progress: Progress
) -> Batches:
    done, passes = 0, how.rounds if options.scope != SEARCHED else 2 + how.trials

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal done
        for feeds in dataset.batches(how.batch_size):
            yield tensors_of(feeds, model.dtype)
            done += len(next(iter(feeds.values())))
            on_progress("looking at the data", done, passes * len(dataset))

    return batches
