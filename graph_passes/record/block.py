"""The record between readers and writers: one MoE block, whatever form it had and whatever form it gets."""

import dataclasses
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graph_passes.weights.weight import Weight
from moe_spec.experts_op import Activation
from moe_spec.feasibility import Groups

SCORE_FIRST = "score_first"
TOPK_FIRST = "topk_first"

ON_OUTPUT = "output"
ON_INPUT = "input"


@dataclasses.dataclass(frozen=True)
class Slots:
    """A router's choice as K slots a token.

    Attributes:
        ids: (T, K) value in the graph, in any shape that holds these T K entries in order.
        weights: likewise.
    """

    ids: gs.Tensor
    weights: gs.Tensor


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How many tokens of a sequence an expert takes; later ones are dropped: their weight is 0.

    Attributes:
        limit: scalar in the graph, int64: a constant, or computed from shapes.
        sequence: value (B, S, ...) whose first two axes say which tokens form a sequence; None where all do.
        by_slot: all first choices take their places before any second choice (V-MoE, https://arxiv.org/abs/2106.05974;
            GShard, https://arxiv.org/abs/2006.16668); else token by token.
        before_renormalisation: whether the weights are divided by the sum of those that were not dropped.
    """

    limit: gs.Tensor
    sequence: gs.Tensor | None = None
    by_slot: bool = False
    before_renormalisation: bool = False


@dataclasses.dataclass(frozen=True)
class Router:
    """From the hidden state to ids and weights.

    ``score(hidden @ weight.T + bias)`` is ranked (plus ``selection_bias``, within ``groups``), the K best are taken,
    and their scores, renormalised and scaled, multiply the experts' outputs. With ``order=topk_first`` the K best
    logits are taken and the score is computed over those K.

    Attributes:
        weight_EH: (E, H).
        bias_E: (E,) added to the logits; -inf makes an expert unreachable.
        selection_bias_E: (E,) added to the scores, or to the logits with ``TOPK_FIRST``, for the choice only.
        score: ``softmax``, ``sigmoid``, ``sqrtsoftplus`` (the root of a softplus), or ``sparsemixer``
            (https://arxiv.org/abs/2409.12136).
        order: ``SCORE_FIRST`` or ``TOPK_FIRST``.
        top_k: K.
        renormalize: whether the K weights are divided by their sum plus ``eps``.
        eps: see ``renormalize`` and ``eps_clips``.
        scale: what the weights are multiplied with at the end.
        groups: group-limited routing, each group scored by the sum of its best experts.
        group_of: for each expert its group, where there are groups.
        hidden: (T, H) what the router reads.
        logits: (T, E) value in the graph.
        choice: (T, E) value in the graph: what is ranked, before groups exclude anything.
        ranked: (T, E) value in the graph: what the last top-k ranks.
        slots: the choice as ids and weights, where the graph has it so; before any is dropped by ``capacity``.
        gates: the choice as gates (T, E), 0 where not selected, where the graph has it so. Neither: the experts' op
            reads the logits and routes by itself.
        scope: path of the MoE block, where the name of the router's weight tells it.
        jitter_eps: of ``sparsemixer``: logits this far (relatively) below the best, twice, are no rivals.
        capacity: how many tokens an expert takes, where that is limited.
        eps_clips: the sum is divided by where it is larger than ``eps``, else ``eps`` is (ernie4_5).
        leads_to: the rows that lead to an expert, where the gates of the others are dropped; None: all do.
        aliases: (row, other) where ``row`` leads to the expert of ``other``, one of ``leads_to``; gates add up.
        gathered: whether the graph's gates, or ids, are of the experts that these rows lead to only.
        unranked: so many of the last rows are not in the graph: experts that its ids do not reach, at -inf here.
        scale_E: (E,) what the weight of each expert is multiplied with in the end, where that is its own (Gemma 4).
    """

    weight_EH: Weight
    bias_E: Weight | None
    selection_bias_E: Weight | None
    score: str
    order: str
    top_k: int
    renormalize: bool
    eps: float
    scale: float
    groups: Groups | None
    group_of: tuple[int, ...]
    hidden: gs.Tensor
    logits: gs.Tensor
    choice: gs.Tensor
    ranked: gs.Tensor
    slots: Slots | None = None
    gates: gs.Tensor | None = None
    scope: str = ""
    jitter_eps: float = 0.0
    capacity: Capacity | None = None
    eps_clips: bool = False
    unranked: int = 0
    leads_to: tuple[int, ...] | None = None
    gathered: bool = False
    aliases: tuple[tuple[int, int], ...] = ()
    scale_E: Weight | None = None

    @property
    def expert_of(self) -> tuple[int, ...]:
        """For each row the expert that it leads to, or -1."""
        assert self.leads_to is not None
        expert_of = dict(zip(self.leads_to, range(len(self.leads_to)), strict=True))
        expert_of.update({row: expert_of[other] for row, other in self.aliases})
        return tuple(expert_of.get(row, -1) for row in range(self.weight_EH.shape[0]))

    @property
    def columns(self) -> int:
        """Experts that the gates of the graph have a column for."""
        return len(self.leads_to) if self.gathered and self.leads_to is not None else self.weight_EH.shape[0]

    @property
    def is_ranked(self) -> bool:
        """Whether anything has to be ranked: not where all experts are selected and no order among them matters."""
        experts = self.weight_EH.shape[0]
        return self.top_k < experts or self.capacity is not None or (self.score == "sparsemixer" and experts > 1)

    @property
    def slot_count(self) -> int:
        """Experts that a token is given to, or would be were they not dropped: all where nothing is ranked."""
        if self.is_ranked or self.leads_to is None:
            return self.top_k
        return len(self.leads_to)

    @property
    def kind(self) -> str:
        """The router in words, for people and manifests."""
        steps = [self.score, "top-k"] if self.order == SCORE_FIRST else ["top-k", self.score]
        if self.selection_bias_E is not None:
            steps.insert(1 if self.order == SCORE_FIRST else 0, "selection bias")
        if self.groups is not None:
            steps.insert(-1, f"{self.groups.selected} of {self.groups.count} groups")
        if self.capacity is not None:
            steps.append("capacity")
        if self.renormalize:
            steps.append("renormalised")
        if self.scale_E is not None:
            steps.append("scaled by expert")
        if self.leads_to is not None:
            leading = f"{len(self.leads_to) + len(self.aliases)} of {self.weight_EH.shape[0]} rows lead to "
            steps.append(leading + (f"one of {len(self.leads_to)} experts" if self.aliases else "an expert"))
        return ", ".join(steps)


@dataclasses.dataclass(frozen=True)
class Experts:
    """The routed FFNs: ``act(x @ gate + gate_bias) * (x @ up + up_bias) @ down + down_bias`` (see ``Activation``).

    Attributes:
        up_EHF: (E, H, F).
        gate_EHF: (E, H, F), None where not gated.
        down_EFH: (E, F, H).
        up_bias_EF: (E, F) or None; gate_bias_EF likewise.
        down_bias_EH: (E, H) or None.
        activation: what happens between.
    """

    up_EHF: Weight
    gate_EHF: Weight | None
    down_EFH: Weight
    up_bias_EF: Weight | None
    gate_bias_EF: Weight | None
    down_bias_EH: Weight | None
    activation: Activation

    def weights(self) -> list[Weight]:
        """Every weight there is."""
        tensors = (self.up_EHF, self.gate_EHF, self.down_EFH, self.up_bias_EF, self.gate_bias_EF, self.down_bias_EH)
        return [tensor for tensor in tensors if tensor is not None]

    def take(self, keep: Sequence[int]) -> "Experts":
        """Those with the ids ``keep``."""
        names = ("up_EHF", "gate_EHF", "down_EFH", "up_bias_EF", "gate_bias_EF", "down_bias_EH")
        held = {name: getattr(self, name) for name in names}
        taken = {name: weight.take(keep) for name, weight in held.items() if weight is not None}
        return dataclasses.replace(self, **taken)


@dataclasses.dataclass(frozen=True)
class Constants:
    """What a token gets, times its gate, in the place of experts that went (https://arxiv.org/abs/2507.00390).

    Attributes:
        rows: of the router, which led to them.
        outputs_DH: (D, H), one for each of ``rows``.
    """

    rows: tuple[int, ...]
    outputs_DH: Weight


@dataclasses.dataclass(frozen=True)
class MoEBlock:
    """One MoE layer.

    Attributes:
        name: path of the block in the model, or ``moe.<index>`` where the graph has lost it.
        form: the form it was read from or written to.
        hidden: (T, H) what the experts read.
        out: (T, H) the weighted sum of the experts' outputs.
        router: see ``Router``.
        experts: see ``Experts``.
        keep: for each expert its id in the source model.
        weights_on: ``ON_OUTPUT`` of the experts, or ``ON_INPUT`` (llama4).
        shaped_like: a value (..., H) whose leading axes ``hidden``, ``out`` and what the router reads have too, where
            they may be others than (T, H).
        constants: what stands in for experts behind a router that stays as it is.
    """

    name: str
    form: str
    hidden: gs.Tensor
    out: gs.Tensor
    router: Router
    experts: Experts
    keep: tuple[int, ...]
    weights_on: str = ON_OUTPUT
    shaped_like: gs.Tensor | None = None
    constants: Constants | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.experts.up_EHF.shape[0]

    @property
    def row_of(self) -> tuple[int, ...]:
        """For each expert the row of the router that leads to it."""
        leads_to = self.router.leads_to
        return tuple(range(self.num_experts)) if leads_to is None or not self.router.gathered else leads_to

    @property
    def nbytes(self) -> int:
        """Bytes of the router's and the experts' weights, and of what stands in for experts."""
        router = self.router
        constants = None if self.constants is None else self.constants.outputs_DH
        small = (router.weight_EH, router.bias_E, router.selection_bias_E, router.scale_E, constants)
        weights = [*self.experts.weights(), *(weight for weight in small if weight is not None)]
        return sum(weight.nbytes for weight in weights)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why one reader did not take a layer.

    Attributes:
        form: the form that was tried.
        reason: what was found and what was expected.
        node: the node where it went wrong.
    """

    form: str
    reason: str
    node: str

    def __str__(self) -> str:
        return f"{self.form}: {self.reason} (at {self.node})"


@dataclasses.dataclass(frozen=True)
class Unrecognised:
    """An MoE layer that no reader takes.

    Attributes:
        layer: its path, or ``moe at <node>`` where the graph has lost it.
        node: the node that gives it away: a router's top-k, or a fused op.
        refusals: what every reader said, the one that came furthest first.
    """

    layer: str
    node: str
    refusals: tuple[Refusal, ...]

    def __str__(self) -> str:
        place = "" if self.node in self.layer else f" ({self.node})"
        return "\n".join([f"layer {self.layer}{place}:", *(f"  {refusal}" for refusal in self.refusals)])


class FormError(Exception):
    """Raised inside a reader where its form ends; `graph_passes.readers` turns it into a ``Refusal``."""

    def __init__(self, reason: str, node: gs.Node | gs.Tensor | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = place_of(node)


def place_of(node: gs.Node | gs.Tensor | None) -> str:
    """A node by its op and its name, or by its first output where it has no name; or a value by its name."""
    if node is None:
        return "a graph input"
    if isinstance(node, gs.Node):
        name = node.name or (node.outputs[0].name if node.outputs else "")
        return f"{node.op} {name!r}"
    return f"value {node.name!r}"
