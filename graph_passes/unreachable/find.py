"""Which experts of a block can never be chosen, or be chosen with a weight of 0 only.

An expert goes where K others rank before it for every input. Where fewer than K have a weight other than 0, K shrinks
to those that have: the others add nothing. Removing rows of the router must change no weight of the rest: their share
in a softmax over all experts is 0, or is divided out.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from graph_passes.record.block import SCORE_FIRST, MoEBlock, Router, place_of
from graph_passes.unreachable.ranges import ALONE, Ranges, ranges_of
from moe_spec.errors import UserError
from moe_spec.layer_plan import FULL, LayerPlan

SILENT = "its gate is 0 for every input"

SUSPICIOUS = 100.0
"""A bias this far below the K-th best is meant as a mask."""


@dataclasses.dataclass(frozen=True)
class Unreachable:
    """An expert that is never chosen, or a mask of which that is not proven.

    Attributes:
        layer: path of the MoE block.
        expert: its id in the graph.
        reason: why it is, or what is missing for the proof.
        node: where the router's logits come from.
    """

    layer: str
    expert: int
    reason: str
    node: str


def summarise(found: Iterable[Unreachable]) -> list[str]:
    """One line for all experts of a layer that share a reason.

    >>> summarise([Unreachable("mlp", 0, "masked", "Add 'x'"), Unreachable("mlp", 3, "masked", "Add 'x'")])
    ["mlp, experts 0, 3: masked (at Add 'x')"]
    """
    experts: dict[tuple[str, str, str], list[str]] = {}
    for item in found:
        experts.setdefault((item.layer, item.reason, item.node), []).append(str(item.expert))
    return [
        f"{layer}, expert{'s' * (len(ids) > 1)} {', '.join(ids)}: {reason} (at {node})"
        for (layer, reason, node), ids in experts.items()
    ]


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found in one block.

    Attributes:
        plan: keeps the experts that can be reached; None where all can.
        unreachable: the others, by id.
        not_proven: experts that are masked as it seems, and stay.
    """

    plan: LayerPlan | None
    unreachable: tuple[Unreachable, ...]
    not_proven: tuple[Unreachable, ...]


@dataclasses.dataclass(frozen=True)
class _Proof:
    """Experts that go, each with its reason; K afterwards."""

    reasons: dict[int, str]
    top_k: int


def find_unreachable(block: MoEBlock, directory: Path) -> Findings:
    """The experts of ``block`` that no input can choose; its weights lie in ``directory``."""
    router = block.router
    if router.leads_to is not None:
        return _find_silent(block, router.leads_to)
    if router.bias_E is None and router.selection_bias_E is None:
        return Findings(None, (), ())
    ranges = ranges_of(router, directory)
    proof = _prove(router, ranges)
    doubts = {expert: _doubt(router, ranges, expert) for expert in _suspects(router) if expert not in proof.reasons}
    try:
        plan = _plan(block, proof)
    except UserError as error:  # routing groups that the rest cannot fill
        doubts |= dict.fromkeys(proof.reasons, f"not proven: {error.what}")
        plan, proof = None, _Proof({}, router.top_k)
    place = place_of(router.logits.inputs[0] if router.logits.inputs else router.logits)
    proven, open_ = (
        tuple(Unreachable(block.name, expert, reason, place) for expert, reason in sorted(found.items()))
        for found in (proof.reasons, doubts)
    )
    return Findings(plan, proven, open_)


def _find_silent(block: MoEBlock, leads_to: Sequence[int]) -> Findings:
    """Experts whose gates are dropped; the router keeps its rows, of which the softmax has shares."""
    if len(leads_to) == block.num_experts:
        return Findings(None, (), ())
    silent = [expert for expert in range(block.num_experts) if expert not in leads_to]
    plan = LayerPlan(block.name, block.num_experts, block.router.top_k, tuple(leads_to), router=FULL)
    place = place_of(block.router.gates)
    return Findings(plan, tuple(Unreachable(block.name, expert, SILENT, place) for expert in silent), ())


def _plan(block: MoEBlock, proof: _Proof) -> LayerPlan | None:
    if not proof.reasons:
        return None
    keep = tuple(expert for expert in range(block.num_experts) if expert not in proof.reasons)
    return LayerPlan(block.name, block.num_experts, proof.top_k, keep, groups=block.router.groups)


def _prove(router: Router, ranges: Ranges) -> _Proof:
    beats = ranges.beats(biased=_lifts_scores(router)) & ranges.quiet[None, :]
    if router.score == "sparsemixer":  # compares with the best, relatively: only -inf is out of the race
        beats &= ranges.masked[None, :]
    if router.groups is not None:
        return _prove_in_groups(router, ranges, beats)
    never = np.flatnonzero(beats.sum(axis=0) >= router.top_k)
    rest = np.flatnonzero(~ranges.weightless)
    shrinks = 0 < len(rest) < router.top_k and router.score != "sparsemixer" and router.capacity is None
    if shrinks and beats[np.ix_(rest, np.flatnonzero(ranges.weightless))].all():
        reason = f"its weight is 0 for every input, as that of all but {len(rest)}: K shrinks from {router.top_k}"
        return _Proof(dict.fromkeys(map(int, np.flatnonzero(ranges.weightless)), reason), len(rest))
    return _Proof({int(expert): _reason(router, ranges, int(expert)) for expert in never}, router.top_k)


def _lifts_scores(router: Router) -> bool:
    """Whether a bias may make a score of 0 rank high; it never does so with a logit of -inf."""
    return router.selection_bias_E is not None and router.order == SCORE_FIRST


def _prove_in_groups(router: Router, ranges: Ranges, beats: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> _Proof:
    """Groups are scored by their best experts: enough of the same group must rank before one that goes.

    A group goes as a whole where all its scores are 0 and no bias lifts them.
    """
    assert router.groups is not None
    group_of = np.asarray(router.group_of)
    needed = max(router.groups.scored_by, router.top_k)
    ahead = (beats & (group_of[:, None] == group_of[None, :])).sum(axis=0)
    gone = ahead >= needed
    if router.selection_bias_E is None:
        gone |= ranges.masked & (ahead >= router.groups.scored_by)
        empty = [group for group in range(router.groups.count) if ranges.masked[group_of == group].all()]
        gone |= np.isin(group_of, empty)
    return _Proof({int(expert): _reason(router, ranges, int(expert)) for expert in np.flatnonzero(gone)}, router.top_k)


def _reason(router: Router, ranges: Ranges, expert: int) -> str:
    ranked = len(ranges.low) - router.unranked
    if expert >= ranked:
        return f"the router gives ids below {ranked}"
    bias = "" if router.selection_bias_E is None else " with its selection bias"
    scored = router.order == SCORE_FIRST and (bool(bias) or router.score in ALONE)
    if ranges.masked[expert]:
        return f"its logit{'' if scored else bias} is -inf for every input"
    rivals = np.sort(np.delete(ranges.low, expert))[-router.top_k]
    value = ("score" if scored else "logit") + bias
    return f"its {value} is at most {ranges.high[expert]:.4g}, {router.top_k} others have at least {rivals:.4g}"


def _suspects(router: Router) -> Sequence[int]:
    """Experts whose bias says that somebody wants them never to be chosen."""
    found: set[int] = set()
    for bias in (router.bias_E, router.selection_bias_E):
        if bias is not None:
            values = bias.load().astype(np.float64)
            found |= {int(expert) for expert in np.flatnonzero(values < np.sort(values)[-router.top_k] - SUSPICIOUS)}
            found |= {int(expert) for expert in np.flatnonzero(np.isneginf(values))}
    return sorted(found)


def _doubt(router: Router, ranges: Ranges, expert: int) -> str:
    """Why a masked expert stays."""
    if ranges.bounded and not ranges.quiet[expert]:
        return "not proven: it has a share in the softmax of the others"
    if router.groups is not None:
        return "not proven: its routing group may be chosen by it, or need it"
    if router.selection_bias_E is not None:
        return "not proven: its selection bias may lift it above others"
    if not ranges.bounded:
        return "not proven: the logits are not bounded, because the router reads no normalised value"
    return "not proven: its rank may be among the best"
