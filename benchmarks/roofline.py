"""What bounds a step of a model on this machine: bytes that it must read, and products that it must compute.

https://doi.org/10.1145/1498765.1498785: no step is quicker than its bytes over the bandwidth, nor than its
floating-point operations over the peak. Both speeds are measured in turns with the models, by the same cores.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import onnx
import onnxruntime as ort
import torch
from transformers import PreTrainedModel

from benchmarks.claims.flops import Flops, count_flops
from models.moe_layers import find_moe_layers
from moe_spec.manifest import TensorSpec
from moe_spec.runner import Arrays, Feeds, Kept
from pruning.finetuning.examples import Inputs
from runtime.measuring.memory import Alone

FLOAT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Of the machine: bytes a second from memory, and floating-point operations a second."""

    bandwidth: float
    peak: float


@dataclasses.dataclass(frozen=True)
class Step:
    """A forward pass of a model with all its experts.

    Attributes:
        flops: of all of it, and of the experts.
        dense_bytes: of the weights that every step reads, and of the cache.
        expert_bytes: of one expert in every layer.
        tokens: that are new.
        experts: of a layer.
        top_k: of them a token is given to.
    """

    flops: Flops
    dense_bytes: int
    expert_bytes: int
    tokens: int
    experts: int
    top_k: int

    def bound(self, kept: int, speeds: Speeds) -> "Bound":
        """What it cannot be quicker than with ``kept`` experts a layer, if tokens spread over as many as they can."""
        top_k = min(self.top_k, kept)
        flops = self.flops.total - self.flops.experts * (1 - top_k / self.top_k)
        read = self.dense_bytes + self.expert_bytes * min(kept, top_k * self.tokens)
        return Bound(1e3 * read / speeds.bandwidth, 1e3 * flops / speeds.peak)


@dataclasses.dataclass(frozen=True)
class Bound:
    """Milliseconds that reading takes, and that computing takes; they may overlap.

    >>> Bound(reading_ms=3.0, computing_ms=1.0).ms, Bound(reading_ms=3.0, computing_ms=1.0).by
    (3.0, 'memory')
    """

    reading_ms: float
    computing_ms: float

    @property
    def ms(self) -> float:
        """The longer of the two."""
        return max(self.reading_ms, self.computing_ms)

    @property
    def by(self) -> str:
        """What takes that long."""
        return "memory" if self.reading_ms > self.computing_ms else "FLOPs"


def step_of(model: PreTrainedModel, inputs: Inputs, tokens: int, cached: int) -> Step:
    """What ``model`` does with ``inputs``, of which ``tokens`` are new; ``cached`` numbers are in its cache."""
    layers = find_moe_layers(model)
    experts = sum(parameter.numel() for layer in layers for parameter in layer.experts.parameters())
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = None if head is None else head.weight  # read whole, though an embedding too
    embeddings = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    looked_up = sum(module.weight.numel() for module in embeddings if module.weight is not tied)  # some rows are read
    dense = model.num_parameters() - experts - looked_up + cached
    return Step(
        flops=count_flops(model, inputs),
        dense_bytes=dense * FLOAT_BYTES,
        expert_bytes=experts // layers[0].num_experts * FLOAT_BYTES,
        tokens=tokens,
        experts=layers[0].num_experts,
        top_k=layers[0].top_k,
    )


@dataclasses.dataclass(frozen=True)
class Probe:
    """Work whose size is known, as a `runtime.bench.Contestant` that takes and gives nothing.

    Attributes:
        name: of a function in `PROBES`.
        times: milliseconds of each run so far. The least tells the speed: a bound is what nothing can be quicker than.
    """

    name: str
    directory: Path = Path()
    file_bytes: int = 0
    inputs: tuple[TensorSpec, ...] = ()
    times: list[float] = dataclasses.field(default_factory=list)

    def open(self, threads: int) -> Self:  # noqa: ARG002 - it uses those that torch was given
        """It is always open."""
        return self

    def alone(self, leading: int, other: int, past: int, threads: int) -> Alone:  # noqa: ARG002 - it is no model
        """Nothing is loaded."""
        return Alone(0.0, None)

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:  # noqa: ARG002 - it has neither
        """Do the work."""
        start = time.perf_counter()
        PROBES[self.name]()
        self.times.append(1e3 * (time.perf_counter() - start))
        return {}

    def step(self, feeds: Feeds, kept: Kept | None = None) -> tuple[Arrays, Kept]:  # noqa: ARG002 - likewise
        """It has no cache."""
        return self.run(feeds), {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


_ROWS, _SIDE = 1 << 14, 1 << 10
_MATRIX, _VECTOR, _SQUARE = torch.ones(_ROWS, _SIDE), torch.ones(_SIDE), torch.ones(_SIDE, _SIDE)
_COPY = torch.empty_like(_MATRIX)


@functools.cache
def _product() -> ort.InferenceSession:
    """A product with `_SQUARE`, which lies packed as a model's weights do."""
    axes = ("N", _SIDE)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes) for name in ("x", "y"))
    weight = onnx.numpy_helper.from_array(_SQUARE.numpy(), "weight")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])], "product", [x], [y], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


READ, COPY = "read 64 MiB", "copy 64 MiB"
MULTIPLY, MULTIPLY_IN_ORT = "multiply 1024 x 1024", "multiply 1024 x 1024 in ONNX Runtime"
PROBES: Mapping[str, Callable[[], object]] = {
    READ: lambda: _MATRIX @ _VECTOR,
    COPY: lambda: _COPY.copy_(_MATRIX),
    MULTIPLY: lambda: _SQUARE @ _SQUARE,
    MULTIPLY_IN_ORT: lambda: _product().run(None, {"x": _SQUARE.numpy()}),
}
"""A matrix times a vector, as decoding does it; a copy, which reads and writes; products of square matrices, for on an
AMD CPU torch's are slower than those of ONNX Runtime."""


def speeds_of(least_ms: Mapping[str, float]) -> Speeds:
    """What the least times of the probes say.

    >>> speeds = speeds_of({READ: 4.0, COPY: 16.0, MULTIPLY: 20.0, MULTIPLY_IN_ORT: 40.0})
    >>> f"{speeds.bandwidth / 1e9:.1f} GB/s, {speeds.peak / 1e9:.0f} GFLOP/s"
    '16.8 GB/s, 107 GFLOP/s'
    """
    matrix = _MATRIX.numel() * FLOAT_BYTES
    bandwidth = max(matrix / least_ms[READ], 2 * matrix / least_ms[COPY])
    product = min(least_ms[MULTIPLY], least_ms[MULTIPLY_IN_ORT])
    return Speeds(1e3 * bandwidth, 1e3 * 2 * _SIDE**3 / product)
