"""Spend a budget on a loaded model: of experts, bytes or milliseconds, by a scope or by search."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import BYTES
from pruning.budget.acceptance import Acceptance, Batches
from pruning.budget.cost import Costs, Measure, by_latency, by_number, by_size
from pruning.budget.evolution import Counts, evolve
from pruning.budget.limit import FLAGS, AtMost, Limit
from pruning.budget.ranked import RankedLayer
from pruning.budget.scopes import SCOPES, SEARCHED, smallest_counts
from pruning.options import PlanOptions

Outcome = tuple[tuple[LayerPlan, ...], dict[str, Any]]
"""What layers keep, and what plan.json says of how that was found."""


def limit_of(
    checkpoint: Path,
    layers: Sequence[RankedLayer],
    options: PlanOptions,
    at_most: AtMost | None,
    measure: Measure | None,
    *,
    trust_remote_code: bool = False,
) -> Limit:
    """The budget, once it is clear that it can be kept to: scores are not looked at.

    Raises:
        UserError: the fewest experts that layers can keep cost more, or nobody is there to measure latencies.
    """
    if at_most is None:
        smallest_counts(layers, options.keep)
        return Limit(by_number(layers), sum(layer.count(options.keep) for layer in layers), str(options.keep))
    if at_most.unit == BYTES:
        costs = by_size(checkpoint, trust_remote_code=trust_remote_code)
    else:
        costs = _measured(layers, measure)
    limit = Limit(costs, at_most.limit(costs.whole), at_most.written)
    limit.check(layers)
    return limit


def _measured(layers: Sequence[RankedLayer], measure: Measure | None) -> Costs:
    if measure is None:
        raise UserError("--max-latency needs something to measure with", hint="give plan_on_data a `measure`")
    return by_latency(layers, measure)


def spend(
    model: PreTrainedModel,
    batches: Batches,
    ranked: Sequence[RankedLayer],
    limit: Limit,
    options: PlanOptions,
    trials: int,
) -> Outcome:
    """Let the layers of ``model`` keep what ``limit`` holds.

    Args:
        model: in eval mode; it stays as it is.
        batches: what the model takes; only searches look at it.
        ranked: its layers.
        limit: of which all layers together stay within.
        options: scope and seed.
        trials: plans that a search tries.

    Raises:
        UserError: protected experts do not fit, or scores that cannot be compared across layers.
    """
    recorded: dict[str, Any] = {}
    # again: which experts are protected is known by now
    if limit.costs.unit in FLAGS:
        limit.check(ranked)
        recorded["keep"] = None
    else:
        smallest_counts(ranked, options.keep)
    if options.scope == SEARCHED:
        counts, recorded["search"] = _search(Acceptance(model, batches), ranked, limit, options.seed, trials)
    else:
        counts = tuple(SCOPES[options.scope].within(ranked, limit.holds))
    costs = limit.costs
    spent = {"most": limit.most, "spent": costs.total(counts), "whole": costs.whole}
    recorded["budget"] = {"written": limit.written, "unit": costs.unit, **spent}
    return _plans(ranked, counts), recorded


def _search(
    acceptance: Acceptance, ranked: Sequence[RankedLayer], limit: Limit, seed: int, trials: int
) -> tuple[Counts, dict[str, Any]]:
    comparable = all(layer.scores.min() >= 0 for layer in ranked)
    names = SCOPES if comparable else ["layer"]
    found = evolve(
        {name: tuple(SCOPES[name].within(ranked, limit.holds)) for name in names},
        [layer.levels() for layer in ranked],
        limit.holds,
        lambda counts: acceptance(_plans(ranked, counts)),
        trials=trials,
        seed=seed,
    )
    fitness = {**found.of_starts, SEARCHED: found.fitness}
    return found.counts, {"acceptance": fitness, "trials": found.trials}


def _plans(ranked: Sequence[RankedLayer], counts: Sequence[int]) -> tuple[LayerPlan, ...]:
    return tuple(layer.plan(count) for layer, count in zip(ranked, counts, strict=True))
