"""Graphs of one MoE layer in which most experts can never be chosen, in every form and with every mask.

What they compute is known, and so is what could go: they are for measuring and testing whoever deletes dead experts.

Example: ``MASKED["stacked.add"]()`` is the model, ``MASKED["stacked.add"].reachable`` the experts that must stay.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.parser

from benchmarks.masked import every_token, grouped, routers, selected
from benchmarks.masked.block import Block
from benchmarks.masked.constants import EXPERTS, HIDDEN, RELU, SWIGLU, constants, weights
from benchmarks.masked.routers import ROUTERS

_GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
masked (float[tokens, {width}] x) => (float[tokens, {width}] out) {{
    hidden = LayerNormalization<axis = -1>(x, norm_scale, norm_bias)
    {router}{experts}
}}
"""

FORMS: Mapping[str, Callable[[Block], str]] = {
    "stacked": every_token.stacked,
    "dense": every_token.dense,
    "masked_loop": every_token.masked_loop,
    "if": every_token.branches,
    "scan": every_token.scan,
    "nonzero": selected.nonzero,
    "gather": selected.gather,
    "batched_mm": selected.batched_mm,
    "sorted": selected.sorted_runs,
    "slices": selected.sorted_slices,
    "grouped": grouped.grouped,
}
"""How the experts are written."""


@dataclasses.dataclass(frozen=True)
class MaskedGraph:
    """One graph, ``x (tokens, 64) -> out (tokens, 64)``; 8 experts, K=2.

    Attributes:
        form: a key of ``FORMS``.
        mask: a key of ``ROUTERS``.
        ffn: ``swiglu`` or ``relu``.
    """

    form: str
    mask: str
    ffn: str = SWIGLU

    def __call__(self) -> onnx.ModelProto:
        """The model, with weights inside, checked."""
        experts = FORMS[self.form](Block(self.mask, self.ffn))
        text = _GRAPH.format(width=HIDDEN, router=ROUTERS[self.mask], experts=experts)
        model = onnx.parser.parse_model(text)
        for name, array in constants(text, self.ffn).items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(array, order="C"), name))
        onnx.checker.check_model(model, full_check=True)
        return model

    @property
    def name(self) -> str:
        """Form and mask."""
        return f"{self.form}.{self.mask}"

    @property
    def reachable(self) -> tuple[int, ...]:
        """Ids of the experts that can be chosen, ascending."""
        return routers.reachable(self.mask)

    @property
    def needed(self) -> int:
        """Parameters of the experts that can be chosen, and of the router's rows that matter."""
        sizes = {name: int(array[0].size) for name, array in weights(self.ffn).items()}
        rows = EXPERTS if self.mask in routers.BEHIND else len(self.reachable)
        row = sizes.pop("router")
        return len(self.reachable) * sum(sizes.values()) + rows * row


_GRAPHS = (
    *(MaskedGraph(form, routers.ADD) for form in FORMS),
    MaskedGraph("stacked", routers.WHERE),
    MaskedGraph("nonzero", routers.WHERE, RELU),
    MaskedGraph("dense", routers.BIAS, RELU),
    MaskedGraph("grouped", routers.BIAS),
    MaskedGraph("batched_mm", routers.FINITE),
    MaskedGraph("masked_loop", routers.FINITE, RELU),
    MaskedGraph("stacked", routers.ZERO_GATES),
    MaskedGraph("masked_loop", routers.ZERO_BRANCH),
    MaskedGraph("if", routers.CONSTANT_IF),
    MaskedGraph("masked_loop", routers.FEWER_IDS),
    MaskedGraph("nonzero", routers.ID_TABLE),
    MaskedGraph("stacked", routers.UNMASKED),
    MaskedGraph("masked_loop", routers.WEAK),
)

MASKED: Mapping[str, MaskedGraph] = {graph.name: graph for graph in _GRAPHS}
"""Every graph by its name."""
