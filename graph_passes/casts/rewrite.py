"""Casts where formats meet: one for each value and format, whoever reads it. Weights are cast as they are written."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from graph_passes.casts.assign import WIDE, Assignment, Format, is_cached
from graph_passes.graph.emitter import Names
from graph_passes.graph.order import sort_nodes
from graph_passes.graph.walk import constants, every_node
from graph_passes.weights.stored import LazyWeight, of_constant
from graph_passes.weights.weight import Array, Weight
from moe_spec.decoder import PAST, PRESENT
from moe_spec.errors import UserError


def insert_casts(assignment: Assignment, directory: Path) -> None:
    """Rewrite the graph of ``assignment``, whose weights lie in ``directory``, in place.

    Inputs and outputs stay float32, but for the cache of a decoder.
    """
    _Rewriter(assignment).run(directory)


class _Rewriter:
    def __init__(self, assignment: Assignment) -> None:
        self._formats = assignment
        self._graph = assignment.graph
        self._names = Names(self._graph)
        self._casts: dict[tuple[int, str], gs.Variable] = {}

    def run(self, directory: Path) -> None:
        nodes = list(every_node(self._graph))
        known = constants(self._graph)
        for node in nodes:
            self._adapt(node)
            for index, tensor in enumerate(list(node.inputs)):
                wanted = self._formats.reads(node, index)
                if wanted is not None and wanted != self._formats.held(tensor):
                    node.inputs[index] = self._cast(tensor, wanted)
        for tensor in known:
            held = self._formats.held(tensor)
            if self._formats.is_float(tensor) and held != WIDE:
                tensor._values = LazyWeight(narrowed(of_constant(tensor, directory), held, tensor.name))
        self._settle_ends()
        sort_nodes(self._graph)

    def _adapt(self, node: gs.Node) -> None:
        """Attributes that say what a node makes."""
        held = self._formats.held(node.outputs[0]) if node.outputs and self._formats.is_float(node.outputs[0]) else WIDE
        if held == WIDE:
            return
        for says in ("to", "output_dtype"):
            if node.attrs.get(says):
                node.attrs[says] = onnx.helper.np_dtype_to_tensor_dtype(held)
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            filled = np.zeros(1, WIDE) if value is None else value.values
            proto = onnx.numpy_helper.from_array(filled.astype(held))
            node.attrs["value"] = gs.Constant(self._names.fresh(f"{node.name}_value"), LazyValues(proto))

    def _cast(self, tensor: gs.Tensor, to: Format) -> gs.Variable:
        key = (id(tensor), to.name)
        if key not in self._casts:
            result = gs.Variable(self._names.fresh(f"{tensor.name}_{to.name}"))
            attributes = {"to": onnx.helper.np_dtype_to_tensor_dtype(to)}
            self._graph.nodes.append(gs.Node("Cast", result.name, attributes, [tensor], [result]))
            self._casts[key] = result
        return self._casts[key]

    def _settle_ends(self) -> None:
        """Inputs and outputs keep their names; those of a cache get the format of what is kept."""
        for tensor in self._graph.inputs:
            tensor.dtype = _declared(self._formats.held(tensor)) if self._formats.is_float(tensor) else tensor.dtype
        kept = {PRESENT + tensor.name.removeprefix(PAST): tensor for tensor in self._graph.inputs}
        for index, tensor in enumerate(self._graph.outputs):
            if not self._formats.is_float(tensor):
                continue
            past = kept.get(tensor.name)
            wanted = self._formats.held(past) if past is not None and is_cached(past.name) else WIDE
            if wanted != self._formats.held(tensor):
                self._graph.outputs[index] = self._named_cast(tensor, wanted)
            self._graph.outputs[index].dtype = _declared(wanted)

    def _named_cast(self, tensor: gs.Tensor, wanted: Format) -> gs.Variable:
        """``tensor`` cast, under its name and with its shape; the value itself gets another name."""
        cast = self._cast(tensor, wanted)
        name, tensor.name = tensor.name, self._names.fresh(f"{tensor.name}_{self._formats.held(tensor).name}")
        cast.name, cast.shape = name, tensor.shape
        return cast


def _declared(held: Format) -> Any:
    """As graphsurgeon wants it of a value: numpy has no bfloat16."""
    return held if held.kind == "f" else onnx.helper.np_dtype_to_tensor_dtype(held)


def narrowed(weight: Weight, to: Format, name: str) -> Weight:
    """``weight`` in format ``to``, rounded to even, once it is read.

    Reading raises:
        UserError: a number of it is beyond what ``to`` has.
    """

    def cast(values: Array) -> Array:
        with np.errstate(over="ignore", under="ignore"):
            rounded: Array = values.astype(to)
        beyond = np.isinf(rounded) & np.isfinite(values)
        if beyond.any():
            raise UserError(
                f"weight {name} holds {float(values[beyond][0]):.6g}, which {to.name} has not",
                hint="ask for bf16, whose range is that of float32",
            )
        return rounded

    return dataclasses.replace(weight.map(weight.shape, cast, row_wise=True), dtype=to)
