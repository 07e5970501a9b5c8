"""Reader for experts that pick their tokens with NonZero and add what they compute where the tokens came from.

::

    tokens, slots = NonZero(one_hot(ids)[e])          NonZero(ids == e)         or tokens = NonZero(gates[:, e])
    out = out.scatter_add(tokens, expert_e(hidden[tokens]) * weights[tokens, slots])

as torch.onnx, old and new, writes the loop of Mixtral and DeepSeek: ScatterND, ScatterElements or Add of one, chained.
Which expert a branch is, and that all is added up, is found out by trying it (see `Trial`).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import SHAPE_ONLY, is_weight, produced_by, producer, source
from graph_passes.readers.parts.single_expert import ExpertParts, read_ffn, require_unbiased, scope_of, stack_experts
from graph_passes.readers.parts.weighing import in_dtype_of
from graph_passes.readers.trial.gathered import AROUND, BEFORE, gather_of, gathered_from
from graph_passes.readers.trial.interpreter import Interpreter, tokens_of
from graph_passes.readers.trial.trial import Trial, fitted
from graph_passes.record.block import ON_INPUT, ON_OUTPUT, FormError, MoEBlock, Router
from graph_passes.routers import Weights, read_gates, read_slots
from graph_passes.weights.weight import Array

FORM = "nonzero"
LOOKS_FOR = "scatter of what experts computed for the tokens that NonZero found"

SCATTERS = ("ScatterND", "ScatterElements")
SUMS = ("Add", "Sum")
LINKS = frozenset({"Cast", "Identity", "Transpose"})
"""What an export without optimiser leaves between one sum and the next."""
ZEROS = ("ConstantOfShape", "Expand")
"""What gives the zeros that the first expert's output is added to."""

INDEX_OPS = SHAPE_ONLY | {"Concat", "Expand", "Gather", "Slice", "Split", "Transpose"}
"""Between NonZero and the indices of a scatter."""
MASK_OPS = INDEX_OPS | {"Greater", "Not"}
"""Between ids, or gates, and NonZero."""
PICKS = AROUND | BEFORE | {"Gather", "GatherND", "Slice", "Split"}
"""Between all weights and those of one expert's tokens."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """One expert: ``output = ffn(x)``.

    Attributes:
        factors: the two sides of the product that weighs ``output`` or, where ``weights_on`` says so, gives ``x``.
            Where it is known, the side with the weights stands last.
    """

    x: gs.Tensor
    output: gs.Tensor
    parts: ExpertParts
    weights_on: str
    factors: tuple[gs.Tensor, gs.Tensor]
    scatter: gs.Node

    def sides(self) -> list[tuple[gs.Tensor, gs.Tensor]]:
        """What may be (tokens, weights), both gathered."""
        if self.weights_on == ON_OUTPUT:
            return [(self.x, self.factors[1])]
        return [self.factors, self.factors[::-1]]


@dataclasses.dataclass(frozen=True)
class Routed:
    """A router and what it hands over: ids and weights as ``values``, or gates (T, E) as ``values`` alone."""

    router: Router
    hidden: gs.Tensor
    ids: gs.Tensor | None
    values: gs.Tensor


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The nodes that give the whole sum: scatters by NonZero, and sums of these, that no other such node adds to."""
    steps: dict[int, gs.Node] = {}
    for node in graph.nodes:
        if _is_step(node, steps):
            steps[id(node.outputs[0])] = node
    inner = {id(tensor) for node in steps.values() for tensor in _addends(node)}
    return [node for output, node in steps.items() if output not in inner]


def _is_step(node: gs.Node, steps: dict[int, gs.Node]) -> bool:
    if node.op in SCATTERS:
        return produced_by(source(node.inputs[1], INDEX_OPS), "NonZero") is not None
    if node.op not in SUMS:
        return False
    addends = _addends(node)
    partial = [id(tensor) in steps for tensor in addends]
    return any(partial) and all(is_step or _is_zeros(tensor) for is_step, tensor in zip(partial, addends, strict=True))


def _is_zeros(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` may be what the first expert's output is added to; an export of fixed shape has it folded."""
    return produced_by(tensor, *ZEROS) is not None or (is_weight(tensor, 2) and not np.any(tensor.values))


def _addends(node: gs.Node) -> list[gs.Tensor]:
    """What ``node`` adds to, or adds up."""
    return [source(tensor, LINKS) for tensor in (node.inputs[:1] if node.op in SCATTERS else node.inputs)]


def read(end: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose experts' outputs are added up in ``end``.

    Raises:
        FormError: with the first op that stands elsewhere than in this form, or the experts that are missing.
    """
    scatters = list(_scatters(end))
    _refuse_hit_experts(scatters)
    branches = [_read_branch(scatter, weights) for scatter in scatters]
    first = branches[0]
    routed = _read_router(first, weights)
    router = routed.router
    shape = (router.weight_EH.shape[0], router.top_k, first.parts.up.weight.shape[0])
    trial = Trial(*shape, tokens=tokens_of(routed.hidden))
    run = Interpreter(weights, trial.tokens)
    run.give(routed.hidden, trial.hidden_TH)
    if routed.ids is None:
        run.give(routed.values, fitted(trial.gates_TE, routed.values))
    else:
        run.give(routed.ids, fitted(trial.ids_TK, routed.ids))
        run.give(routed.values, fitted(trial.weights_TK, routed.values))
    order = _try(branches, routed.values, end, trial, run)
    experts = stack_experts([branches[index].parts for index in order])
    if first.weights_on == ON_INPUT:
        require_unbiased(experts, first.parts.up.node)
    return MoEBlock(
        name=scope_of(first.parts) or router.scope or name,
        form=FORM,
        hidden=routed.hidden,
        out=in_dtype_of(experts.down_EFH, end.outputs[0]),
        router=router,
        experts=experts,
        keep=tuple(range(len(order))),
        weights_on=first.weights_on,
    )


def _scatters(end: gs.Node) -> Iterator[gs.Node]:
    """Every scatter that ``end`` adds up, itself included."""
    waiting, seen = [end], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in SCATTERS and produced_by(source(node.inputs[1], INDEX_OPS), "NonZero"):
            yield node
        waiting += [inner for tensor in _addends(node) if (inner := produced_by(tensor, *SCATTERS, *SUMS))]


def _read_branch(scatter: gs.Node, weights: Weights) -> Branch:
    value = _added(source(scatter.inputs[2], AROUND))
    product = produced_by(value, "Mul")
    sides = [] if product is None else [tuple(product.inputs), tuple(reversed(product.inputs))]
    for side, gate in sides:
        if gather_of(gate) is not None and gather_of(side) is None:
            x, parts = read_ffn(source(side), weights)
            return Branch(x, source(side), parts, ON_OUTPUT, (side, gate), scatter)
    weighed = None
    if product is None:
        x, parts = read_ffn(value, weights)
        weighed = produced_by(x, "Mul")
    if weighed is None:
        raise FormError("an expert's output is not multiplied with gathered weights", producer(value))
    return Branch(x, value, parts, ON_INPUT, tuple(weighed.inputs), scatter)


def _refuse_hit_experts(scatters: list[gs.Node]) -> None:
    """Refuse branches that look up which expert they are, as a tracer leaves ``for e in those that were hit``.

    Raises:
        FormError: with the number of branches, which is the number of experts that the example happened to hit.
    """
    for weight in _kernels(scatters[0]):
        pick = produced_by(source(weight, {"Transpose"}), "Gather")
        if pick is not None and is_weight(pick.inputs[0], 3) and isinstance(pick.inputs[1], gs.Variable):
            raise FormError(
                f"{len(scatters)} branches compute whichever of {pick.inputs[0].shape[0]} experts are hit: "
                "the exporter kept as many as its example hit",
                pick,
            )


def _kernels(scatter: gs.Node) -> list[gs.Tensor]:
    """What the last product before ``scatter`` multiplies by, on either side of the weights."""
    value = _added(source(scatter.inputs[2], AROUND))
    weighed = produced_by(value, "Mul")
    sides = [value] if weighed is None else weighed.inputs
    products = [produced_by(source(side), "MatMul", "Gemm") for side in sides]
    return [product.inputs[1] for product in products if product is not None]


def _added(value: gs.Tensor) -> gs.Tensor:
    """What is added to the rows that are read before they are written again."""
    node = produced_by(value, "Add")
    if node is None:
        return value
    for side, other in (node.inputs, reversed(node.inputs)):
        read = gather_of(side)
        if read is not None and isinstance(read.inputs[1], gs.Variable):
            return source(other)
    return value


def _read_router(branch: Branch, weights: Weights) -> Routed:
    """Where the decisions come from that ``branch`` obeys, whichever side of a product the weights are."""
    asked = _asked(branch.scatter)
    refusal = None
    for picked, gate in branch.sides():
        pick, values = gather_of(picked), source(gate, PICKS)
        if pick is None:
            raise FormError("an expert does not read gathered tokens", branch.parts.up.node)
        try:
            if values is source(asked, PICKS):
                return Routed(read_gates(values, weights), gathered_from(pick), None, values)
            return Routed(read_slots(asked, values, weights), gathered_from(pick), asked, values)
        except FormError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _asked(scatter: gs.Node) -> gs.Tensor:
    """What NonZero looks at: ids that are compared with that of an expert, or gates."""
    found = produced_by(source(scatter.inputs[1], INDEX_OPS), "NonZero")
    assert found is not None
    mask = source(found.inputs[0], MASK_OPS)
    node = produced_by(mask, "Equal", "OneHot")
    if node is None:
        return mask
    if node.op == "OneHot":
        return source(node.inputs[0], {"Unsqueeze", "Cast"})
    sides = [side for side in node.inputs if isinstance(source(side), gs.Variable) and not produced_by(side, "Range")]
    if len(sides) != 1:
        raise FormError("NonZero does not look for the id of an expert", node)
    return source(sides[0], {"Unsqueeze", "Cast"})


def _gate(branch: Branch, values: gs.Tensor) -> gs.Tensor:
    """The weights of ``branch``, gathered from ``values``."""
    for _, gate in branch.sides():
        if source(gate, PICKS) is values:
            return gate
    raise FormError("the experts are weighed with different values", branch.scatter)


def _try(branches: list[Branch], values: gs.Tensor, end: gs.Node, trial: Trial, run: Interpreter) -> list[int]:
    """For each expert the number of its branch.

    Raises:
        FormError: a branch reads or gives something else than its expert would, or an expert has no branch.
    """
    found: list[int] = []
    wanted_TH: Array = np.zeros(())
    for branch in branches:
        gate = _gate(branch, values)
        on_input = branch.weights_on == ON_INPUT
        slots = trial.slots(run.of(gate), producer(gate))
        read = run.of(branch.x)
        trial.require_tokens(read, slots, branch.parts.up.node, weighed=on_input)
        found.append(trial.expert_of(slots, branch.parts.up.node))
        width = branch.parts.down.weight.shape[1]
        if width != trial.hidden_TH.shape[1]:
            reason = f"an expert reads {trial.hidden_TH.shape[1]} channels and gives {width}"
            raise FormError(reason, branch.parts.down.node)
        rows = trial.outputs(len(slots), width)
        run.give(branch.output, rows.reshape(*read.shape[:-1], -1))
        wanted_TH = wanted_TH + trial.summed(slots, rows if on_input else rows * trial.weights_of(slots))
    trial.require_all(found, end)
    if not np.array_equal(run.of(end.outputs[0]), wanted_TH):
        raise FormError("the experts' outputs are not added up token by token", end)
    return [found.index(expert) for expert in range(len(found))]
