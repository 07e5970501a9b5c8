"""Read experts that are computed side by side: every projection is one product with a constant that holds all of them.

::

    middle = act(x @ gate) * (x @ up)           biases anywhere; gate and up in one constant or in two; or no gate
    out = sum over experts of gates * (middle @ down)

The gates may multiply the experts' outputs, what the down projection reads, or the experts' input. How the constants
hold the experts is the form's own (``Layout``); that all axes are where they belong is proven (``axis_reader``).
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, source
from graph_passes.readers.axes.axis_reader import AxisReader
from graph_passes.readers.axes.names import ELEMENTWISE, EXPERTS, HIDDEN, PARTS, SLOTS, TOKENS, WIDTH, Axes, Axis
from graph_passes.readers.parts.activation import INTERLEAVED, SEPARATE, Middle, read_activation
from graph_passes.readers.parts.layout import scope_in
from graph_passes.readers.parts.single_expert import require_unbiased
from graph_passes.readers.parts.weighing import MOVES, Weighing, check_tokens, follow, route, sum_of
from graph_passes.record.block import ON_INPUT, ON_OUTPUT, Experts, FormError, MoEBlock, Router
from graph_passes.routers import Weights
from graph_passes.weights.weight import Weight

FURTHEST_PROJECTION = 60
"""Values that are looked at between two projections of an FFN."""

REPEATS = frozenset({"Expand", "Identity", "Tile", "Unsqueeze"})
"""Ops that hand every expert its own copy of the tokens."""

UP, DOWN = (HIDDEN, WIDTH), (WIDTH, HIDDEN)
"""What a projection reads and what it gives."""


@dataclasses.dataclass(frozen=True)
class Held:
    """A constant that holds a part of all experts.

    Attributes:
        tensor: the value in which it meets the others.
        axes: of that value.
        load: the part as (E, in, out), or (E, out) of a bias, given the number of experts.
    """

    tensor: gs.Tensor
    axes: Axes
    load: Callable[[Weights, int], Weight]


@dataclasses.dataclass(frozen=True)
class Product:
    """``x @ kernel`` of all experts, or of those with these ``ids`` (T, K)."""

    node: gs.Node
    x: gs.Tensor
    kernel: Held
    ids: gs.Tensor | None = None


class Layout(Protocol):
    """How a form holds its experts.

    Attributes:
        form: its name.
    """

    form: str

    def product(self, node: gs.Node, ends: tuple[Axis, Axis]) -> Product | None:
        """``node`` as a product that reads and gives the axes ``ends`` of each expert; None where it is none."""

    def bias(self, term: gs.Tensor, width: Axis, gates: gs.Tensor | None) -> Held | None:
        """``term`` as a bias of all experts, where it is one; ``gates`` where they were multiplied before."""


@dataclasses.dataclass(frozen=True)
class Projection:
    """``(product + bias) * gates``, where there are any."""

    product: Product
    bias: Held | None
    gates: gs.Tensor | None = None

    def held(self) -> list[Held]:
        """Its constants."""
        return [self.product.kernel] if self.bias is None else [self.product.kernel, self.bias]


@dataclasses.dataclass(frozen=True)
class Ffn:
    """All experts' FFNs as they stand in the graph; ``gate`` where it is a projection of its own."""

    up: Projection
    gate: Projection | None
    down: Projection
    middle: Middle

    def held(self) -> list[Held]:
        """Its constants."""
        return [held for part in (self.up, self.gate, self.down) if part is not None for held in part.held()]


def is_down(layout: Layout, node: gs.Node) -> bool:
    """Whether ``node`` is the second of two products with constants of experts, with no other product between."""
    product = layout.product(node, DOWN)
    return product is not None and reaches_product(layout, product.x)


def reaches_product(layout: Layout, tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is computed, element by element, from a product with the experts' constants."""
    front, seen = [tensor], 0
    while front and seen < FURTHEST_PROJECTION:
        node, seen = producer(front.pop()), seen + 1
        if node is None:
            continue
        if layout.product(node, UP) is not None:
            return True
        if node.op in ELEMENTWISE | PARTS | MOVES:
            front.extend(node.inputs)
    return False


def read_block(layout: Layout, node: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block whose down projection is the product ``node``.

    Raises:
        FormError: with the first op that stands elsewhere than in this form.
    """
    down = layout.product(node, DOWN)
    assert down is not None
    gates, result = _gates_before(layout, down.x)
    weighing = follow(node.outputs[0], gates, lambda term: layout.bias(term, HIDDEN, gates) is not None)
    bias = None if weighing.bias is None else layout.bias(weighing.bias, HIDDEN, gates)
    ffn = read_ffn(layout, result, Projection(down, bias))
    ids = down.ids or weighing.ids
    axes = AxisReader(EXPERTS if ids is None else SLOTS)
    router, weights_on, x = _gating(node, ffn, weighing, ids, axes, weights)
    hidden = _hidden_of(x, router)
    experts = experts_of(ffn, router.columns, weights)
    if weights_on == ON_INPUT:
        require_unbiased(experts, node)
    axes.size(EXPERTS, router.columns)
    axes.size(HIDDEN, router.weight_EH.shape[1])
    axes.size(WIDTH, experts.up_EHF.shape[2])
    axes.know(hidden, TOKENS, HIDDEN)
    for held in ffn.held():
        axes.know(held.tensor, *held.axes)
    return MoEBlock(
        name=scope_in(ffn.up.product.kernel.tensor.name) or router.scope or name,
        form=layout.form,
        hidden=hidden,
        out=sum_of(weighing, axes, experts.down_EFH),
        router=router,
        experts=experts,
        keep=tuple(range(router.columns)),
        weights_on=weights_on,
    )


def _gates_before(layout: Layout, x: gs.Tensor) -> tuple[gs.Tensor | None, gs.Tensor]:
    """(gates, what they multiply) where the down projection reads their product; else (None, ``x``)."""
    node = produced_by(source(x, MOVES), "Mul")
    if node is not None:
        for this, other in (node.inputs, reversed(node.inputs)):
            gates = produced_by(source(other, {"Cast"}), "Unsqueeze") or not reaches_product(layout, other)
            if gates and not isinstance(other, gs.Constant) and reaches_product(layout, this):
                return other, this
    return None, x


def read_ffn(layout: Layout, result: gs.Tensor, down: Projection) -> Ffn:
    """The FFN whose down projection reads ``result``, before any gates."""
    middle = read_activation(result)
    up = _read_projection(layout, middle.projection)
    gate = None if middle.gate is None else _read_projection(layout, middle.gate)
    if gate is not None and gate.product.x is not up.product.x:
        raise FormError("gate and up read different values", gate.product.node)
    for part in (up, gate):
        if part is not None and _ids(part) is not _ids(down):
            raise FormError("the projections are of different experts", part.product.node)
    return Ffn(up, gate, down, middle)


def _ids(part: Projection) -> gs.Tensor | None:
    return None if part.product.ids is None else source(part.product.ids, MOVES)


def _read_projection(layout: Layout, tensor: gs.Tensor) -> Projection:
    gates, tensor = _gates_before(layout, tensor)
    node, bias = producer(source(tensor, MOVES)), None
    if node is not None and node.op == "Add":
        for this, other in (node.inputs, reversed(node.inputs)):
            bias = layout.bias(other, WIDTH, None)
            if bias is not None:
                node = producer(source(this, MOVES))
                break
    product = None if node is None else layout.product(node, UP)
    if node is None or product is None:
        raise FormError("a projection is no product with the weights of all experts", node or tensor)
    if node.op == "Gemm" and len(node.inputs) > 2:
        bias = layout.bias(node.inputs[2], WIDTH, None)
    return Projection(product, bias, gates)


def _gating(
    node: gs.Node, ffn: Ffn, weighing: Weighing, ids: gs.Tensor | None, axes: AxisReader, weights: Weights
) -> tuple[Router, str, gs.Tensor]:
    """(router, where its weights multiply, the tokens that the experts read before they do)."""
    x, up_gates = ffn.up.product.x, ffn.up.gates
    gate_gates = up_gates if ffn.gate is None else ffn.gate.gates
    if up_gates is None and gate_gates is None:
        if weighing.gates is not None:
            return route(weighing.gates, ids, axes, weights), ON_OUTPUT, x
        router, tokens = _gates_on_input(node, x, ids, axes, weights)
        return router, ON_INPUT, tokens
    if weighing.gates is not None or up_gates is None or not (gate_gates is None or gate_gates is up_gates):
        raise FormError("gates multiply more than once, or not all of an expert", node)
    # Gated projections are those of gated tokens where they have no bias; up alone is as good as the output.
    return route(up_gates, ids, axes, weights), ON_INPUT if gate_gates is up_gates else ON_OUTPUT, x


def _gates_on_input(
    down: gs.Node, x: gs.Tensor, ids: gs.Tensor | None, axes: AxisReader, weights: Weights
) -> tuple[Router, gs.Tensor]:
    """(router, what its gates multiply) of experts that read gated tokens (Llama 4)."""
    node = produced_by(source(x, MOVES), "Mul")
    if node is None:
        raise FormError("nothing multiplies the experts by gates", down)
    failures = []
    for this, other in (node.inputs, reversed(node.inputs)):
        try:
            return route(other, ids, axes, weights), this
        except FormError as error:
            failures.append(error)
    raise failures[0]


def _hidden_of(x: gs.Tensor, router: Router) -> gs.Tensor:
    """The tokens (T, H) of which every expert reads a copy."""
    node = producer(x)
    while node is not None and x is not router.hidden:
        if node.op not in REPEATS and not (node.op == "Reshape" and produced_by(node.inputs[0], *REPEATS)):
            break
        x = node.inputs[0]
        node = producer(x)
    check_tokens(x)
    return x


def experts_of(ffn: Ffn, count: int, weights: Weights) -> Experts:
    """``count`` experts as a record.

    Raises:
        FormError: the weights do not hold as many, or do not fit together.
    """
    try:
        up, gate, down = (
            None if part is None else part.product.kernel.load(weights, count) for part in (ffn.up, ffn.gate, ffn.down)
        )
        up_bias, gate_bias, down_bias = (
            None if part is None or part.bias is None else part.bias.load(weights, count)
            for part in (ffn.up, ffn.gate, ffn.down)
        )
        assert up is not None
        assert down is not None
        if ffn.middle.gating not in (None, SEPARATE):
            gate, up = (up.half(2, half, interleaved=ffn.middle.gating == INTERLEAVED) for half in (0, 1))
            if up_bias is not None:
                interleaved = ffn.middle.gating == INTERLEAVED
                gate_bias, up_bias = (up_bias.half(1, half, interleaved=interleaved) for half in (0, 1))
    except ValueError as error:
        raise FormError(f"the weights hold no {count} experts: {error}", ffn.down.product.node) from error
    experts = Experts(up, gate, down, up_bias, gate_bias, down_bias, ffn.middle.activation)
    _check(experts, ffn.down.product.node)
    return experts


def _check(experts: Experts, node: gs.Node) -> None:
    count, hidden, width = experts.up_EHF.shape
    biases = ((experts.up_bias_EF, width), (experts.gate_bias_EF, width), (experts.down_bias_EH, hidden))
    fits = (
        experts.down_EFH.shape == (count, width, hidden)
        and (experts.gate_EHF or experts.up_EHF).shape == experts.up_EHF.shape
        and all(bias is None or bias.shape == (count, length) for bias, length in biases)
    )
    if not fits:
        shapes = [list(weight.shape) for weight in experts.weights()]
        raise FormError(f"the experts' weights have shapes {shapes}, which do not fit together", node)
