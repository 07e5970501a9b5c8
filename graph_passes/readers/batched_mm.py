"""Reader for transformers' ``batched_mm`` experts as torch.onnx exports them: weights gathered for each (token, slot).

::

    x = Reshape(Expand(Unsqueeze(hidden)))                  each token K times
    up = MatMul(GatherND(W_up, ids), x) [+ GatherND(b_up, ids)]
    down = MatMul(GatherND(W_down, ids), act(up)) [+ GatherND(b_down, ids)]
    out = ReduceSum(Reshape(down * weights), axis of K)

Weights are (E, out, in) where they stand left of the MatMul, (E, in, out) where they stand right.
"""

import dataclasses

import onnx_graphsurgeon as gs

from graph_passes.graph.walk import produced_by, producer, sink, source
from graph_passes.readers.parts.activation import INTERLEAVED, read_activation
from graph_passes.readers.parts.layout import check_stacked, from_stacked, scope_in
from graph_passes.readers.parts.no_ops import before, behind
from graph_passes.readers.parts.projection import read_weight
from graph_passes.readers.parts.quantized import is_stored
from graph_passes.record.block import FormError, MoEBlock
from graph_passes.routers import Weights, read_slots
from moe_spec.experts_op import ExpertsOp

FORM = "batched_mm"
LOOKS_FOR = "GatherND of stacked expert weights"


@dataclasses.dataclass(frozen=True)
class Projection:
    """``MatMul(GatherND(weight, ids), x) + GatherND(bias, ids)``."""

    gather: gs.Node
    x: gs.Tensor
    bias: gs.Tensor | None
    transposed: bool


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The nodes that gather down projections: GatherND of stacked matrices whose product is multiplied by a gate."""
    stacked = [node for node in graph.nodes if node.op == "GatherND" and is_stored(before(node.inputs[0]), 3)]
    return [node for node in stacked if _gating(node) is not None]


def read(down_gather: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block that ends behind ``down_gather``.

    Raises:
        FormError: with the first op that stands elsewhere than in this form.
    """
    gating = _gating(down_gather)
    if gating is None:
        raise FormError("the gathered product is not multiplied by a gate", down_gather)
    mul, down_tensor, gate_tensor = gating
    down = _read_projection(down_tensor)
    middle = read_activation(down.x)
    if middle.gate is not None:
        raise FormError("gate and up are gathered from two weights", producer(middle.gate))
    up = _read_projection(middle.projection)
    ids = _ids_of(up.gather)
    if up.transposed != down.transposed or ids is not _ids_of(down.gather):
        raise FormError("the two projections gather by different ids or layouts", up.gather)
    op = ExpertsOp(
        activation=middle.activation,
        gated=middle.gating is not None,
        interleaved=middle.gating == INTERLEAVED,
        transposed=up.transposed,
        biased=up.bias is not None,
    )
    tensors = (before(up.gather.inputs[0]), before(down.gather.inputs[0]), up.bias, down.bias)
    up_weight, down_weight, up_bias, down_bias = (
        None if part is None else read_weight(part, weights) for part in tensors
    )
    assert up_weight is not None
    assert down_weight is not None
    check_stacked(up.gather, up_weight, down_weight, up_bias, down_bias, op)
    router = read_slots(ids, gate_tensor, weights)
    return MoEBlock(
        name=scope_in(source(before(up.gather.inputs[0]), {"DequantizeLinear"}).name) or router.scope or name,
        form=FORM,
        hidden=_read_hidden(up.x),
        out=_read_sum(mul),
        router=router,
        experts=from_stacked(up_weight, down_weight, up_bias, down_bias, op),
        keep=tuple(range(router.weight_EH.shape[0])),
    )


def _gating(gather: gs.Node) -> tuple[gs.Node, gs.Tensor, gs.Tensor] | None:
    """(Mul, its product side, its gate side) where the gathered product is multiplied with what has K slots a token."""
    matmul = next((node for node in behind(gather.outputs[0]).outputs if node.op == "MatMul"), None)
    if matmul is None:
        return None
    value = sink(matmul.outputs[0])
    added = next((node for node in value.outputs if node.op == "Add"), None)
    value = value if added is None else sink(added.outputs[0])
    mul = next((node for node in value.outputs if node.op == "Mul"), None)
    if mul is None:
        return None
    other = mul.inputs[1] if mul.inputs[0] is value else mul.inputs[0]
    is_gate = produced_by(sink(mul.outputs[0]), "Reshape", "Mul") and len(mul.outputs[0].outputs) == 1
    reduced = sink(mul.outputs[0]).outputs
    return (mul, value, other) if is_gate and reduced and reduced[0].op == "ReduceSum" else None


def _read_projection(tensor: gs.Tensor) -> Projection:
    node, bias = producer(source(tensor)), None
    if node is not None and node.op == "Add":
        left, right = (source(term) for term in node.inputs)
        product, bias = (right, _gathered_bias(left)) if _gathered_bias(left) else (left, _gathered_bias(right))
        if bias is None:
            raise FormError("a projection adds something else than a gathered bias", node)
        node = producer(product)
    if node is None or node.op != "MatMul":
        raise FormError("a projection is no MatMul", node or tensor)
    for side in (0, 1):
        gather = produced_by(before(node.inputs[side]), "GatherND")
        if gather is not None and is_stored(before(gather.inputs[0]), 3):
            return Projection(gather, source(node.inputs[1 - side]), bias, transposed=side == 1)
    raise FormError("a projection does not multiply by gathered weights", node)


def _ids_of(gather: gs.Node) -> gs.Tensor:
    """What ``gather`` gathers by, before it was reshaped."""
    ids = gather.inputs[1]
    while (earlier := source(before(ids))) is not ids:
        ids = earlier
    return ids


def _read_hidden(repeated: gs.Tensor) -> gs.Tensor:
    """(T, H) of ``Reshape(Expand(Unsqueeze(hidden)))``, each token K times."""
    expand = produced_by(source(repeated, {"Reshape", "Unsqueeze"}), "Expand")
    unsqueeze = None if expand is None else produced_by(expand.inputs[0], "Unsqueeze")
    if unsqueeze is None:
        raise FormError("the tokens are not repeated by Unsqueeze, Expand and Reshape", producer(repeated))
    return unsqueeze.inputs[0]


def _gathered_bias(tensor: gs.Tensor) -> gs.Tensor | None:
    gather = produced_by(before(tensor), "GatherND")
    stored = None if gather is None else before(gather.inputs[0])
    return stored if stored is not None and is_stored(stored, 2) else None


def _read_sum(mul: gs.Node) -> gs.Tensor:
    reduce = sink(mul.outputs[0]).outputs[0]
    if reduce.op != "ReduceSum":
        raise FormError("the gated outputs are not summed over the slots of a token", reduce)
    return reduce.outputs[0]
