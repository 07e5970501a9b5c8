"""The constants of a router as weights, and the path that their names tell."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import producer
from graph_passes.record.block import FormError
from graph_passes.weights.stored import of_constant
from graph_passes.weights.weight import Weight


@dataclasses.dataclass(frozen=True)
class Weights:
    """Gives readers the weights of a model in ``directory``, each looked up once."""

    directory: Path
    _known: dict[int, tuple[gs.Constant, Weight]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def of(self, constant: gs.Tensor) -> Weight:
        """The weight behind ``constant``.

        Raises:
            FormError: it is computed.
        """
        if not isinstance(constant, gs.Constant):
            raise FormError("a weight is no constant", producer(constant) or constant)
        if id(constant) not in self._known:
            self._known[id(constant)] = (constant, of_constant(constant, self.directory))
        return self._known[id(constant)][1]

    def flat(self, constant: gs.Constant, length: int) -> Weight:
        """``constant`` of shape (length,) or (1, length) as (length,).

        Raises:
            FormError: it has another number of entries.
        """
        weight = self.of(constant)
        if int(np.prod(weight.shape)) != length:
            raise FormError(f"a router vector has shape {list(weight.shape)}, expected [{length}]", constant)
        return weight if weight.shape == (length,) else weight.map((length,), np.ravel).cached()


def block_scope(weight_name: str) -> str:
    """The path of the MoE block, where the exporter kept the name of the router's weight, or a writer gave it one.

    >>> block_scope("model.layers.0.mlp.gate.weight"), block_scope("layers.0.mlp/router.weight"), block_scope("val_12")
    ('model.layers.0.mlp', 'layers.0.mlp', '')
    """
    scope, found, _ = weight_name.rpartition("/router.weight")
    if found:
        return scope
    parts = weight_name.split(".")
    return ".".join(parts[:-2]) if parts[-1] == "weight" else ""
