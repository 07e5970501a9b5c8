"""One MoE layer while it is written."""

import dataclasses
import functools

import numpy as np

from tests.graph_passes.block_models.builder import Builder
from tests.graph_passes.block_models.quantize import Quantized, quantize
from tests.graph_passes.block_models.spec import Spec
from tests.graph_passes.block_models.tensors import matrices, vectors


@dataclasses.dataclass(frozen=True)
class Block:
    """What router and experts read.

    Attributes:
        name: path of the layer.
        tensors: `tensors.drawn` for the layer.
        x: (T, H) or (B, S, H), as the layer gets it.
        hidden: the same as (T, H).
    """

    b: Builder
    name: str
    tensors: dict[str, np.ndarray]
    x: str
    hidden: str

    @property
    def spec(self) -> Spec:
        return self.b.spec

    @functools.cached_property
    def matrices(self) -> dict[str, np.ndarray]:
        """(E, out, in) by the projection's name."""
        return matrices(self.spec, self.tensors)

    @functools.cached_property
    def quantized(self) -> dict[str, Quantized]:
        """The same as it is stored."""
        return {part: quantize(self.spec, matrix) for part, matrix in matrices(self.spec, self.tensors).items()}

    @functools.cached_property
    def vectors(self) -> dict[str, np.ndarray]:
        """(E, out) by the projection's name; empty where experts have no biases."""
        return vectors(self.spec, self.tensors)

    def parameter(self, name: str) -> str:
        """Name of an experts' parameter."""
        return f"{self.name}.experts.{name}"
