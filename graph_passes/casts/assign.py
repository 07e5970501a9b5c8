"""In which format every node computes, and every value is held."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.casts.dtypes import FLOAT, STANDARD, Types, formal, infer_types, schema_of
from graph_passes.casts.kinds import (
    CONTRIB,
    FOLLOWERS,
    FUSED,
    GATES,
    ISLANDS,
    LOOK_UPS,
    PRODUCTS,
    UNTYPED,
    Kind,
    follow,
    product,
)
from graph_passes.casts.regions import Regions
from graph_passes.proof.retype import BFLOAT16
from graph_passes.record.block import place_of
from graph_passes.weights.stored import of_constant
from moe_spec.decoder import PAST
from moe_spec.errors import UserError
from moe_spec.experts_op import DOMAIN

Format = np.dtype[Any]

WIDE = np.dtype(np.float32)

NO_BFLOAT16 = "bfloat16, of which ONNX Runtime has no kernels on a CPU: the float32 graph of the rounded weights was"

LARGEST_LOOKED_AT = 1 << 16
"""Values of a constant that are read to see whether they fit; larger ones are weights, if no scales of such."""

SMALLEST_NORMAL = 2.0**-14
"""The smallest number of which float16 has all digits; bfloat16 has them down to where float32 has."""

CACHED = (".key", ".value", ".indexer_key", ".conv_state")
"""How names of a cache's tensors end that hold activations; recurrent states, sums over all tokens, stay float32."""


@dataclasses.dataclass(frozen=True)
class Formats:
    """What was asked for: float32 where nothing was.

    Attributes:
        experts: of the experts.
        rest: of everything else but routers.
    """

    experts: Format
    rest: Format

    @property
    def has_bfloat16(self) -> bool:
        """Whether either is bfloat16, which is not run on a CPU."""
        return BFLOAT16 in (self.experts, self.rest)


class Assignment:
    """Formats of the nodes of one graph (in topological order), and of its values."""

    def __init__(self, graph: gs.Graph, directory: Path, regions: Regions, formats: Formats) -> None:
        self.graph = graph
        self._directory = directory
        self._regions = regions
        self._formats = formats
        self._opset = int(graph.opset)
        self._types: Types = infer_types(graph)
        self._kinds: dict[int, Kind] = {}
        self._computed: dict[int, Format] = {}
        self._held: dict[int, Format] = {}
        self._inner = {id(node) for body in graph.subgraphs(recursive=True) for node in body.nodes}
        for tensor in graph.inputs:
            self._settle(tensor, *((Kind.NARROW, formats.rest) if is_cached(tensor.name) else (Kind.WIDE, WIDE)))
        for node in graph.nodes:
            self._decide(node)
        for node in reversed(graph.nodes):
            self._take_what_readers_want(node)
        for tensor in _constants(graph):
            if self.is_float(tensor):
                self._held[id(tensor)] = self._wanted(tensor)

    def is_float(self, tensor: gs.Tensor) -> bool:
        """Whether it was float32 before."""
        return self._types.get(id(tensor)) == FLOAT

    def held(self, tensor: gs.Tensor) -> Format:
        """The format of a float32 value from now on."""
        return self._held.get(id(tensor), WIDE)

    def reads(self, node: gs.Node, index: int) -> Format | None:
        """The format in which ``node`` takes its operand ``index``; None where it takes any, or it is no float."""
        tensor = node.inputs[index]
        untyped = node.domain in STANDARD and node.op in UNTYPED
        if untyped or not self.is_float(tensor):
            return None
        if GATES.get(node.domain) == index:
            return WIDE
        return WIDE if id(node) in self._inner else self._computed.get(id(node), WIDE)

    def _settle(self, tensor: gs.Tensor, kind: Kind, held: Format) -> None:
        if self.is_float(tensor):
            self._kinds[id(tensor)], self._held[id(tensor)] = kind, held

    def _low(self, node: gs.Node) -> Format:
        """The low precision where ``node`` stands."""
        if id(node) in self._regions.routers:
            return WIDE
        return self._formats.experts if id(node) in self._regions.experts else self._formats.rest

    def _decide(self, node: gs.Node) -> None:
        floats = [tensor for tensor in (*node.inputs, *node.outputs) if self.is_float(tensor)]
        if not floats:
            return
        kind = self._kind(node)
        self._computed[id(node)] = self._low(node) if kind is Kind.NARROW else WIDE
        for tensor in node.outputs:
            self._settle(tensor, kind, self._computed[id(node)])

    def _kind(self, node: gs.Node) -> Kind:
        """What ``node`` makes of what it reads."""
        low = self._low(node)
        if id(node) in self._regions.routers or any(True for _ in node.subgraphs()):
            return Kind.WIDE
        if node.domain == DOMAIN:
            return Kind.NARROW
        if node.domain == CONTRIB or schema_of(node, self._opset) is None:
            return _fused(node)
        if not self._has_kernel(node, low):
            return ISLANDS.get(node.op, Kind.WIDE)
        kinds = [self._kind_of(tensor, low, node) for tensor in node.inputs if self.is_float(tensor)]
        if node.op in PRODUCTS:
            return product(kinds)
        if node.op == "Cast" and not kinds:
            return Kind.FREE if self._types.get(id(node.inputs[0])) == onnx.TensorProto.BOOL else Kind.EXACT
        adds_up = node.op == "ReduceSum" and id(node) in self._regions.experts  # as many terms as a token has experts
        if node.op not in FOLLOWERS and not adds_up:
            return ISLANDS.get(node.op, Kind.WIDE)
        kind = follow(kinds)
        table = node.op in LOOK_UPS and not isinstance(node.inputs[1], gs.Constant)
        return Kind.NARROW if table and kind is Kind.FREE else kind

    def _kind_of(self, tensor: gs.Tensor, low: Format, node: gs.Node) -> Kind:
        if isinstance(tensor, gs.Constant):
            return Kind.FREE if node.op in PRODUCTS or self._fits(tensor, low, node) else Kind.EXACT
        kind = self._kinds.get(id(tensor), Kind.WIDE)
        return Kind.NARROW if kind is Kind.WIDE and self._enters(tensor, node) else kind

    def _enters(self, tensor: gs.Tensor, node: gs.Node) -> bool:
        """Whether ``tensor`` is a hidden state that experts get: it is cast once, before each of them gets a part."""
        regions, makers = self._regions, {id(maker) for maker in tensor.inputs}
        return id(node) in regions.experts and not makers & (regions.experts | regions.routers)

    def _fits(self, tensor: gs.Constant, low: Format, node: gs.Node) -> bool:
        """Whether no number of ``tensor`` becomes infinite in ``low``; nor 0, where it is the only one.

        Scales of quantised weights must not lose digits either: all that they scale would.
        """
        is_scale = node.op == "DequantizeLinear"
        if low == WIDE or (math.prod(tensor.shape) > LARGEST_LOOKED_AT and not is_scale):
            return True
        values = of_constant(tensor, self._directory).load()
        with np.errstate(over="ignore", under="ignore"):
            cast = values.astype(low)
        smallest = SMALLEST_NORMAL if is_scale and low == np.float16 else 0
        small = (np.abs(values) < smallest) | ((cast == 0) & (values.size == 1))
        vanishes = bool((small & (values != 0)).any())
        return not vanishes and not bool((np.isinf(cast) & np.isfinite(values)).any())

    def _has_kernel(self, node: gs.Node, low: Format) -> bool:
        """Whether ONNX defines the op for ``low``, in this opset: bfloat16 came late to many."""
        schema, name = schema_of(node, self._opset), f"tensor({low.name})"
        if low == WIDE or node.op in UNTYPED or schema is None:
            return True
        allowed = {entry.type_param_str: entry.allowed_type_strs for entry in schema.type_constraints}
        ends = ((schema.inputs, node.inputs), (schema.outputs, node.outputs))
        letters = [
            formal(parameters, index).type_str
            for parameters, tensors in ends
            for index, tensor in enumerate(tensors)
            if self.is_float(tensor)
        ]
        return all(name in allowed.get(letter, (letter,)) for letter in letters)

    def _take_what_readers_want(self, node: gs.Node) -> None:
        """A constant in another shape is made in the low precision where all that read it compute in that.

        So is what guards a softmax against rows that are masked whole: then the softmax is cast where it is made.
        TensorRT-RTX 1.7 fuses attention and fails where the cast stands behind the guard.
        """
        free = [tensor for tensor in node.outputs if self._kinds.get(id(tensor)) is Kind.FREE or self._guards(node)]
        if not free:
            return
        wanted = {self._wanted(tensor) for tensor in free}
        if wanted == {self._low(node)}:
            self._computed[id(node)] = self._low(node)
            for tensor in free:
                self._held[id(tensor)] = self._low(node)

    def _guards(self, node: gs.Node) -> bool:
        """Whether ``node`` puts a number where there is none: a choice rounds nothing, before a cast or after it."""
        if node.op != "Where" or [maker.op for maker in node.inputs[0].inputs] != ["IsNaN"]:
            return False
        low = self._low(node)
        kinds = {self._kind_of(tensor, low, node) for tensor in node.inputs[1:]}
        return kinds == {Kind.FREE, Kind.WIDE} and self._has_kernel(node, low)

    def _wanted(self, tensor: gs.Tensor) -> Format:
        """The format that all readers of ``tensor`` take; float32 where they differ."""
        wanted = {WIDE for output in self.graph.outputs if output is tensor}
        for node in tensor.outputs:
            found = [self.reads(node, index) for index, other in enumerate(node.inputs) if other is tensor]
            wanted |= {each for each in found if each is not None}
        return wanted.pop() if len(wanted) == 1 else WIDE


def is_cached(name: str) -> bool:
    """Whether an input of this name holds what a decoder keeps of each token, in the format that it computes in."""
    return name.startswith(PAST) and name.endswith(CACHED)


def _fused(node: gs.Node) -> Kind:
    kind = FUSED.get(node.op)
    if kind is None:
        raise UserError(
            f"{place_of(node)} of domain {node.domain!r} is an op whose types nobody knows: nothing can be cast for it",
            hint="leave --precision and --rest-precision out",
        )
    return kind


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    seen: set[int] = set()
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
