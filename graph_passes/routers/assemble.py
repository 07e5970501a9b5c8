"""Put a router's record together from the steps that were read behind its logits."""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import producer
from graph_passes.record.block import Capacity, FormError, Router, Slots
from graph_passes.routers.finish import AS_IT_STANDS, Finish
from graph_passes.routers.linear import read_linear
from graph_passes.routers.parameters import Weights
from moe_spec.feasibility import Groups


@dataclasses.dataclass(frozen=True)
class Steps:
    """What a router does with its logits, as read; see ``Router`` for the fields.

    Attributes:
        top_k: None where nothing is ranked, so that all experts are taken.
        selection_bias: as it lies in the graph.
        scales: likewise.
        group_of: the group of each expert where the graph has a table; else they are runs of one length.
    """

    score: str
    order: str
    top_k: int | None
    logits: gs.Tensor
    choice: gs.Tensor
    ranked: gs.Tensor
    finish: Finish = AS_IT_STANDS
    selection_bias: gs.Constant | None = None
    groups: Groups | None = None
    group_of: tuple[int, ...] = ()
    jitter_eps: float = 0.0
    capacity: Capacity | None = None
    scales: gs.Constant | None = None


def dropped(steps: Steps, capacity: Capacity | None, node: gs.Node) -> Steps:
    """``steps``, then choices beyond ``capacity`` are dropped.

    Raises:
        FormError: some were dropped before.
    """
    if capacity is not None and steps.capacity is not None:
        raise FormError("choices are dropped twice", node)
    return steps if capacity is None else dataclasses.replace(steps, capacity=capacity)


def finished(steps: Steps, finish: Finish, node: gs.Node) -> Steps:
    """``steps``, then ``finish``.

    Raises:
        FormError: the weights are renormalised before and after some are dropped.
    """
    capacity, earlier = steps.capacity, steps.finish
    if capacity is not None and finish.renormalize:
        if earlier.renormalize:
            raise FormError("the weights are renormalised twice", node)
        capacity = dataclasses.replace(capacity, before_renormalisation=True)
    return dataclasses.replace(steps, finish=finish.after(earlier, node), capacity=capacity)


def assemble(
    steps: Steps, weights_of: Weights, *, slots: Slots | None = None, gates: gs.Tensor | None = None
) -> Router:
    """The router that does ``steps``, whose choice the graph has as ``slots`` or ``gates``.

    Raises:
        FormError: its projection is not a constant one, or what it adds does not fit.
    """
    linear = read_linear(steps.logits, weights_of)
    experts, groups, bias, scales = linear.weight_EH.shape[0], steps.groups, steps.selection_bias, steps.scales
    return Router(
        weight_EH=linear.weight_EH,
        bias_E=linear.bias_E,
        selection_bias_E=None if bias is None else weights_of.flat(bias, experts),
        score=steps.score,
        order=steps.order,
        top_k=experts if steps.top_k is None else steps.top_k,
        renormalize=steps.finish.renormalize,
        eps=steps.finish.eps,
        eps_clips=steps.finish.eps_clips,
        scale=steps.finish.scale,
        groups=groups,
        group_of=() if groups is None else _groups_of(steps, groups, experts),
        hidden=linear.hidden,
        logits=steps.logits,
        choice=steps.choice,
        ranked=steps.ranked,
        slots=slots,
        gates=gates,
        scope=linear.scope,
        jitter_eps=steps.jitter_eps,
        capacity=_rooted(steps, linear.hidden),
        scale_E=None if scales is None else weights_of.flat(scales, experts),
    )


def _groups_of(steps: Steps, groups: Groups, experts: int) -> tuple[int, ...]:
    if len(steps.group_of) == experts and all(0 <= group < groups.count for group in steps.group_of):
        return steps.group_of
    if steps.group_of or groups.count < 1 or experts % groups.count:
        raise FormError(f"{experts} experts are no {groups.count} groups of one size", producer(steps.ranked))
    return tuple(expert // (experts // groups.count) for expert in range(experts))


def _rooted(steps: Steps, hidden: gs.Tensor) -> Capacity | None:
    """The capacity, whose sequences are told by what the router reads instead of by what it ranks."""
    capacity = steps.capacity
    if capacity is None or capacity.sequence is not steps.ranked:
        return capacity
    return dataclasses.replace(capacity, sequence=hidden)
