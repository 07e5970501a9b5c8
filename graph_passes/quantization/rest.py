"""Quantise what is neither router nor expert: matrices that products outside the MoE layers multiply by.

Attention's projections, dense FFNs, shared experts and the head are such; each becomes values behind a
DequantizeLinear, as experts do. Left as they are, and told with the reason: weights that are looked up (embeddings) or
convolved, those that something else reads too, gates (one output), and those whose inputs blocks do not divide.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from graph_passes.graph.dequantize import BLOCKED_SINCE, SINCE
from graph_passes.graph.emitter import Emitter, Names
from graph_passes.graph.opset import raise_opset
from graph_passes.graph.walk import every_node, source
from graph_passes.quantization.quantize import Quantization, quantized_weight, rounded_weight
from graph_passes.readers.axes.operands import STORED
from graph_passes.readers.parts.projection import read_weight
from graph_passes.record.block import FormError, MoEBlock
from graph_passes.routers import Weights
from graph_passes.weights.weight import Weight, stack
from moe_spec.errors import UserError
from moe_spec.formats import FLOATS, said

PRODUCTS = ("MatMul", "Gemm")

SMALL = 1 << 10
"""Values of a constant that is told of where it stays what it is; those with fewer are biases, norms and masks."""


@dataclasses.dataclass(frozen=True)
class Rest:
    """What became of the weights outside the MoE layers.

    Attributes:
        quantized: names of those that were.
        left: of the others name and reason.
    """

    quantized: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """In words: how many, and how many were left for which reason.

        >>> print(Rest(("q", "k"), (("embeddings", "Gather reads it"), ("gate", "it gives one number, as gates do"))))
        2 weights; left as they are: 1 (Gather reads it), 1 (it gives one number, as gates do)
        """
        reasons = Counter(reason for _, reason in self.left)
        left = ", ".join(f"{count} ({reason})" for reason, count in sorted(reasons.items()))
        return f"{len(self.quantized)} weights" + (f"; left as they are: {left}" if left else "")


def to_details(rest: Rest) -> dict[str, list[Any]]:
    """As a manifest has it: what is read from a file is equal to what was written."""
    return {"quantized": list(rest.quantized), "left": [list(pair) for pair in rest.left]}


def of_details(entry: Mapping[str, list[Any]]) -> Rest:
    """Of a manifest."""
    return Rest(tuple(entry["quantized"]), tuple((name, reason) for name, reason in entry["left"]))


def quantize_rest(graph: gs.Graph, directory: Path, blocks: Sequence[MoEBlock], how: Quantization) -> Rest:
    """Quantise the rest of ``graph``, of which ``blocks`` were read; nothing is computed before it is saved.

    Raises:
        UserError: the graph cannot be of the opset that is needed.
    """
    needed = max(SINCE[how.numbers.dtype.name], 0 if how.shared is None else BLOCKED_SINCE)

    def change(weight: Weight) -> Weight:
        raise_opset(graph, needed, "what dequantises weights outside the MoE layers")
        return quantized_weight(weight, how)

    return _change(graph, directory, blocks, how, change)


def round_rest(graph: gs.Graph, directory: Path, blocks: Sequence[MoEBlock], how: Quantization) -> None:
    """Give the rest of ``graph`` the values of `quantize_rest`, in its own dtype."""
    _change(graph, directory, blocks, how, lambda weight: rounded_weight(weight, how))


def check_routers_known(unknown: Sequence[str]) -> None:
    """Refuse a model with layers of which nobody knows what their router is.

    Raises:
        UserError: there are such, ``unknown``.
    """
    if unknown:
        raise UserError(
            f"routers are never quantised, and that of layer {unknown[0]} is not recognised",
            hint="leave --rest-precision out",
        )


def _change(
    graph: gs.Graph,
    directory: Path,
    blocks: Sequence[MoEBlock],
    how: Quantization,
    change: Callable[[Weight], Weight],
) -> Rest:
    """Let every product outside ``blocks`` read ``change`` of its matrix (1, in, out)."""
    weights, emitter = Weights(directory), Emitter(graph, "rest", Names(graph))
    changed, left = [], []
    for stored, reads in _large_constants(graph, blocks, weights):
        reason = _why_left(reads) or next(filter(None, (_why_not(read, weights, how) for read in reads)), None)
        if reason is not None:
            left.append((stored.name, reason))
            continue
        done: dict[int, gs.Tensor] = {}
        for read in reads:
            if id(read.tensor) not in done:
                new = change(stack([_matrix(read, weights)])).one(0)
                done[id(read.tensor)] = emitter.weight(stored.name, new.swap() if read.is_turned else new)
            read.node.inputs[read.index] = done[id(read.tensor)]
        changed.append(stored.name)
    return Rest(tuple(changed), tuple(left))


@dataclasses.dataclass(frozen=True)
class _Read:
    """``node`` reads ``tensor``, its input ``index``, which is a constant or that transposed or cast."""

    node: gs.Node
    index: int
    tensor: gs.Tensor
    inside: bool

    @property
    def is_factor(self) -> bool:
        """Whether the node multiplies by it, outside the MoE layers."""
        return self.node.op in PRODUCTS and not self.node.domain and self.index == 1 and not self.inside

    @property
    def is_turned(self) -> bool:
        """Whether it is (out, in)."""
        return bool(self.node.attrs.get("transB", 0))


def _large_constants(
    graph: gs.Graph, blocks: Sequence[MoEBlock], weights: Weights
) -> list[tuple[gs.Constant, list[_Read]]]:
    """Float constants of two axes or more that something outside ``blocks`` reads, and everybody who does."""
    inside = {id(node) for block in blocks for node in nodes_of(block)}
    found: dict[int, tuple[gs.Constant, list[_Read]]] = {}
    for node in graph.nodes:
        for index, tensor in _read_by(node):
            stored = source(tensor, STORED)
            if isinstance(stored, gs.Constant) and _is_large(weights.of(stored)):
                found.setdefault(id(stored), (stored, []))[1].append(_Read(node, index, tensor, id(node) in inside))
    return [(stored, reads) for stored, reads in found.values() if not all(read.inside for read in reads)]


def _read_by(node: gs.Node) -> list[tuple[int, gs.Tensor]]:
    """What ``node`` reads, and at which place; what its bodies do is at none. Nothing of ops that only pass it on."""
    if node.op in STORED:
        return []
    bodies = [(-1, tensor) for body in node.subgraphs() for inner in every_node(body) for tensor in inner.inputs]
    return [*enumerate(node.inputs), *bodies]


def _is_large(weight: Weight) -> bool:
    return len(weight.shape) > 1 and math.prod(weight.shape) >= SMALL and said(weight.dtype.name) in FLOATS


def _why_left(reads: Sequence[_Read]) -> str | None:
    """Why a constant stays what it is, whatever it holds."""
    others = sorted({read.node.op for read in reads if not read.is_factor})
    if not others:
        return None
    too = " too" if any(read.is_factor for read in reads) else ""
    return f"{', '.join(others)} reads it{too}"


def _matrix(read: _Read, weights: Weights) -> Weight:
    """(in, out), or whatever it is that a product multiplies by.

    Raises:
        FormError: a constant that was moved about otherwise.
    """
    weight = read_weight(read.tensor, weights)
    return weight.swap() if read.is_turned else weight


def _why_not(read: _Read, weights: Weights, how: Quantization) -> str | None:
    """Why what a product multiplies by cannot be quantised."""
    try:
        matrix = _matrix(read, weights)
    except FormError as error:
        return error.reason
    if len(matrix.shape) != 2:
        return f"it has {len(matrix.shape)} axes"
    inputs, outputs = matrix.shape
    if outputs == 1:
        return "it gives one number, as gates do"
    if how.shared is not None and inputs % how.shared:
        return f"its {inputs} inputs are no multiple of the block size {how.shared}"
    return None


def nodes_of(block: MoEBlock) -> list[gs.Node]:
    """The nodes of a layer: on a way from what router and experts read to the sum of what the experts give."""
    before, front = {}, [*block.out.inputs]
    starts = {id(tensor) for hidden in (block.hidden, block.router.hidden) for tensor in (hidden, source(hidden))}
    while front:
        node = front.pop()
        if id(node) not in before:
            before[id(node)] = node
            front.extend(other for tensor in node.inputs if id(tensor) not in starts for other in tensor.inputs)
    behind, front = set(), [node for hidden in (block.hidden, block.router.hidden) for node in hidden.outputs]
    while front:
        node = front.pop()
        if id(node) in before and id(node) not in behind:
            behind.add(id(node))
            front.extend(other for tensor in node.outputs for other in tensor.outputs)
    return [before[found] for found in behind]
