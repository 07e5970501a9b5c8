"""Find the part that went wrong: each part of a candidate is given what the reference's was given.

Both models are cut at their MoE layers. The parts, in order: what lies before the first MoE layer, its router, its
experts, what lies before the next one, and so on. Where experts are the first to differ, each is run by itself.
T tokens, E experts, H hidden width.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_spec.dataset import Dataset
from moe_spec.progress import Progress, counted, silent
from moe_spec.runner import Arrays, Feeds, error_between
from runtime.execution import BY_DEFAULT, Execution
from runtime.parity import Flags, Floats, Routing, compare_routing, moved_experts
from runtime.verification.cut_run import CutPair, CutRun, LayerPair
from runtime.verification.diagnosis import what_experts_do, what_router_does
from runtime.verification.fault import EXPERTS, REST, ROUTER, Fault
from runtime.verification.sides import batches_of, count_batches
from runtime.verification.tolerances import Tolerance

TOKENS_AN_EXPERT = 8
"""Seen by each expert, at least, while those that differ are looked for; fewer where there are no more."""

COMPARED = 16
"""Of the experts that differ, so many are compared with each other: they may have changed places."""


class Part(NamedTuple):
    """``kind`` (a place in `KINDS`) of MoE layer number ``layer``, or what lies before it; in graph order."""

    layer: int
    kind: int


KINDS = (REST, ROUTER, EXPERTS)
"""The kinds of parts, as they follow each other."""


def find_fault(
    pair: CutPair,
    directory: Path,
    data: Dataset | None = None,
    *,
    tolerance: Tolerance,
    batch_size: int = 32,
    threads: int = 0,
    execution: Execution = BY_DEFAULT,
    on_progress: Progress = silent,
) -> Fault | None:
    """The first part that differs by more than ``tolerance`` in any batch; None where none does.

    Args:
        pair: reference and candidate, as `graph_passes.variants.cut` writes them.
        directory: of the reference, whose config.json may tell the size of the vocabulary.
        data: as for ``verify``; without it random feeds.
        tolerance: what is allowed of each part.
        batch_size: examples that are run at once.
        threads: that one operator may use on a CPU; 0 for one a core.
        execution: how ONNX Runtime is to run the candidate; the reference is run on the CPU.
        on_progress: told of every batch.

    Raises:
        UserError: a model cannot be run here, or does not take the feeds.
    """
    with CutRun.open(pair, threads, execution) as run:
        differing: dict[Part, list[tuple[float, Feeds]]] = {}
        batches = batches_of(run.watched.inputs, directory, data, batch_size)
        for feeds, _ in counted(batches, "looking for the fault", count_batches(data, batch_size), on_progress):
            for part, error in _parts_that_differ(run, feeds, tolerance):
                differing.setdefault(part, []).append((error, feeds))
        if not differing:
            return None
        first = min(differing)
        most = max(
            (feeds for _, feeds in differing[first]), key=lambda feeds: sum(array.size for array in feeds.values())
        )
        return _explain(run, first, max(error for error, _ in differing[first]), most, tolerance)


def _parts_that_differ(run: CutRun, feeds: Feeds, allowed: Tolerance) -> Iterator[tuple[Part, float]]:
    """Those that are out of tolerance on one batch, and by how much."""
    values = run.of_reference(feeds)
    got = run.of_candidate(feeds, values)
    for index, layer in enumerate(run.layers):
        rest = _error(values[layer.watched.hidden], got[layer.candidate.hidden])
        router = _error_of_router(*_routers(layer, values, got), layer.watched.top_k, allowed)
        experts = _error_of_sums(layer, values, got)
        for kind, error, limit in (
            (REST, rest, allowed.element),
            (ROUTER, router, 0.0),
            (EXPERTS, experts, allowed.element),
        ):
            if not error <= limit:
                yield Part(index, KINDS.index(kind)), error
    last = max((_error(values[name], got[name]) for name in run.pair.candidate.outputs), default=0.0)
    if not last <= allowed.element:
        yield Part(len(run.layers), KINDS.index(REST)), last


def _error_of_router(mine: Routing, theirs: Routing, top_k: int, allowed: Tolerance) -> float:
    """The largest difference of a gate where rounding does not explain it; 0 where there is none."""
    compared = compare_routing(mine, theirs, top_k)
    if moved_experts(mine, theirs):
        return float(compared.gate_error.max())
    wrong_T = compared.flipped & (compared.margin > allowed.margin) & (compared.weight > allowed.element)
    wrong_T |= ~compared.flipped & (compared.gate_error > allowed.margin)
    return float(compared.gate_error[wrong_T].max(initial=0.0))


def _routers(layer: LayerPair, values: Arrays, got: Arrays) -> tuple[Routing, Routing]:
    """What both chose, over the experts of the source model."""
    mine, theirs = layer.watched, layer.candidate
    experts = max(*mine.keep, *theirs.keep) + 1
    return (
        Routing.of(values[mine.gates], values[mine.scores], mine.keep, experts),
        Routing.of(got[theirs.gates], got[theirs.scores], theirs.keep, experts),
    )


def _error_of_sums(layer: LayerPair, values: Arrays, got: Arrays) -> float:
    """Of what experts give together; where it cannot be told whom to run, on tokens for which the same ones run."""
    same_T = slice(None) if layer.candidate.forced is not None else _select_the_same(layer, values, got)
    return _error(values[layer.watched.out][same_T], got[layer.candidate.out][same_T])


def _select_the_same(layer: LayerPair, values: Arrays, got: Arrays) -> Flags:
    mine, theirs = _routers(layer, values, got)
    return np.asarray(((mine.gates != 0) == (theirs.gates != 0)).all(axis=1))


def _explain(run: CutRun, part: Part, error: float, feeds: Feeds, allowed: Tolerance) -> Fault:
    """What ``part`` does instead, on the largest of the batches on which it differs."""
    kind, values = KINDS[part.kind], run.of_reference(feeds)
    layer = run.layers[part.layer] if part.layer < len(run.layers) else None
    wrong: tuple[int, ...] = ()
    says = f"it differs by {error:.1e} of its largest magnitude"
    if layer is not None and kind == ROUTER:
        says = what_router_does(*_routers(layer, values, run.of_candidate(feeds, values)), allowed.margin)
    elif layer is not None and kind == EXPERTS and not layer.can_be_forced:
        wrong = _experts_of_tokens_that_differ(layer, values, run.of_candidate(feeds, values), allowed)
    elif layer is not None and kind == EXPERTS:
        wrong = _experts_that_differ(run, layer, feeds, values, allowed)
        tokens = len(values[layer.watched.hidden])
        tables = {expert: run.alone(layer, feeds, values, np.full(tokens, expert)) for expert in wrong[:COMPARED]}
        says = what_experts_do(tables, wrong, len(layer.candidate.keep), allowed.element)
    name = None if layer is None else layer.candidate.name
    return Fault(kind, name, wrong, error if math.isfinite(error) else None, says)


def _experts_that_differ(
    run: CutRun, layer: LayerPair, feeds: Feeds, values: Arrays, allowed: Tolerance
) -> tuple[int, ...]:
    """Every expert by itself; a run shows as many of them as there are tokens."""
    experts, tokens = np.asarray(layer.candidate.keep), len(values[layer.watched.hidden])
    errors, largest = dict.fromkeys(layer.candidate.keep, 0.0), 0.0
    for turn in range(min(len(experts), math.ceil(TOKENS_AN_EXPERT * len(experts) / tokens))):
        chosen_T = experts[(np.arange(tokens) + turn) % len(experts)]
        wanted_TH, found_TH = run.alone(layer, feeds, values, chosen_T)
        largest = max(largest, float(np.abs(wanted_TH).max()))
        difference_T = _largest(wanted_TH - found_TH)
        for expert in np.unique(chosen_T).tolist():
            errors[expert] = max(errors[expert], float(difference_T[chosen_T == expert].max()))
    return tuple(expert for expert, error in errors.items() if error > allowed.element * largest)


def _experts_of_tokens_that_differ(
    layer: LayerPair, values: Arrays, got: Arrays, allowed: Tolerance
) -> tuple[int, ...]:
    """Those whose every token differs, where not every token does: they cannot be run by themselves."""
    wanted_TH, found_TH = (array.astype(np.float64) for array in (values[layer.watched.out], got[layer.candidate.out]))
    selected_TE = _routers(layer, values, got)[0].gates[:, list(layer.candidate.keep)] != 0
    fine_T = _largest(wanted_TH - found_TH) <= allowed.element * np.abs(wanted_TH).max()
    fine_T |= ~_select_the_same(layer, values, got)
    wrong_E = selected_TE.any(axis=0) & ~selected_TE[fine_T].any(axis=0)
    return tuple(expert for expert, wrong in zip(layer.candidate.keep, wrong_E, strict=True) if wrong and fine_T.any())


def _largest(difference_TH: Floats) -> Floats:
    return np.asarray(np.nan_to_num(np.abs(difference_TH), nan=np.inf).max(axis=1))


def _error(wanted: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    return error_between(wanted, found)[1]
