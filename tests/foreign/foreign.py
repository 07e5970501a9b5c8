"""What is known about one foreign graph."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.foreign.exporters import Export
from tests.foreign.inputs import Example, Inputs


@dataclasses.dataclass(frozen=True)
class Foreign:
    """How one graph is made, and what it is.

    Attributes:
        form: the form that its MoE layers have.
        router: the router in words; there are always eight experts.
        make: gives the torch model, with weights that are always the same.
        inputs: what it takes.
        export: writes the graph.
        layers: MoE layers that it has.
        top_k: K.
        branches: experts that the graph holds, fewer than eight where the exporter lost some.
        runs: whether ONNX Runtime's CPU provider runs it.
    """

    form: str
    router: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    export: Export
    layers: int = 1
    top_k: int = 2
    branches: int = 8
    runs: bool = True

    def reference(self, example: Example) -> Tensor:
        """The first output of the torch model: what the first output of the graph is to be."""
        with torch.inference_mode():
            outputs = self.make()(**example)
        return outputs if isinstance(outputs, Tensor) else outputs[0]
