"""What a device computes in halves, on a machine that has no kernels for them.

ONNX Runtime's CPU provider computes most ops of float16 in float32 and leaves out the casts in between; bfloat16 it
does not run. So the graph in float32 rounds every value that is held in halves, by arithmetic that no optimiser
removes: with ``c = (2^s + 1) x``, the number ``c - (c - x)`` is ``x`` rounded to s bits less (Veltkamp's splitting, in
Dekker, https://doi.org/10.1007/BF01397083). float32 has 13 bits more than float16, and 16 more than bfloat16.

Products add up in float32, as tensor cores do. Numbers below 6e-5, of which float16 has fewer bits, keep all 11 of
them; and what the experts' node computes within itself is not rounded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.casts.dtypes import infer_types
from graph_passes.casts.kinds import MOVERS
from graph_passes.graph.emitter import Emitter, Names
from graph_passes.graph.order import sort_nodes
from graph_passes.graph.walk import replace_reads
from graph_passes.model_file import load_graph, save_variant
from graph_passes.record.block import place_of
from moe_spec.errors import VerificationError
from moe_spec.manifest import MODEL
from moe_spec.runner import Arrays, Feeds, Runner

EMULATED = "emulated.onnx"

END = float(np.finfo(np.float16).max)

BITS_LESS: Mapping[int, int] = {onnx.TensorProto.FLOAT16: 13, onnx.TensorProto.BFLOAT16: 16}


@dataclasses.dataclass(frozen=True)
class Largest:
    """The value that comes nearest to the end of float16.

    Attributes:
        node: that computes it, and the weight that it reads, if it reads one.
        magnitude: largest of its numbers that are not infinite.
    """

    node: str
    magnitude: float


@dataclasses.dataclass(frozen=True)
class Emulated:
    """What a rounded graph gave.

    Attributes:
        outputs: for each batch.
        largest: None where nothing is held in float16.
    """

    outputs: tuple[Arrays, ...]
    largest: Largest | None


def run_emulated(widened: Path, result: gs.Graph, batches: Sequence[Feeds], runner: Runner) -> Emulated:
    """Run ``result`` with every value rounded as it is held there.

    ``widened`` is a directory with the same graph in float32; it gets one more file.

    Raises:
        VerificationError: a value is beyond float16; the first one is named.
    """
    graph, types = load_graph(widened / MODEL), _halves(result)
    emitter, names = Emitter(graph, "emulated", Names(graph)), [output.name for output in graph.outputs]
    watched: list[tuple[gs.Node, gs.Variable]] = []
    for node in list(graph.nodes):
        for tensor in node.outputs:
            if tensor.name in types and node.op not in MOVERS:
                _round(emitter, tensor, BITS_LESS[types[tensor.name]])
                if types[tensor.name] == onnx.TensorProto.FLOAT16:
                    watched.append((node, _largest(emitter, tensor)))
    graph.outputs.extend(output for _, output in watched)
    sort_nodes(graph)
    save_variant(graph, widened / EMULATED)
    runs = runner.run(widened / EMULATED, batches)
    found = [Largest(_place(node), max(float(run[output.name]) for run in runs)) for node, output in watched]
    beyond = next((each for each in found if each.magnitude > END), None)
    if beyond is not None:
        raise VerificationError(
            f"{beyond.node} reaches {beyond.magnitude:.3g}, and float16 ends at {END:.0f}; nothing was written; "
            "bf16 has the range of float32"
        )
    outputs = tuple({name: run[name] for name in names} for run in runs)
    return Emulated(outputs, max(found, key=lambda each: each.magnitude, default=None))


def _halves(result: gs.Graph) -> dict[str, int]:
    """The type of every value that a node gives in halves."""
    types = infer_types(result)
    values = (tensor for node in result.nodes for tensor in node.outputs)
    return {tensor.name: types[id(tensor)] for tensor in values if types.get(id(tensor)) in BITS_LESS}


def _round(emitter: Emitter, tensor: gs.Tensor, bits: int) -> None:
    """Let whoever reads ``tensor`` read it without its last ``bits`` bits."""
    factor = emitter.array("factor", np.float32(2**bits + 1))
    raised = emitter.emit("Mul", tensor, factor, label="raised")
    rest = emitter.emit("Sub", raised, tensor, label="rest")
    short = emitter.emit("Sub", raised, rest, label="short")
    endless = emitter.emit("IsInf", tensor, label="endless")
    rounded = emitter.emit("Where", endless, tensor, short, label="rounded")  # infinity less infinity is no number
    own = [value.inputs[0] for value in (raised, rest, endless, rounded)]
    replace_reads(tensor, rounded, except_by=own)


def _largest(emitter: Emitter, tensor: gs.Tensor) -> gs.Variable:
    """The largest magnitude in ``tensor``, infinities of masks left out; 0 where it is empty."""
    zero = emitter.array("zero", np.zeros(1, np.float32))
    finite = emitter.emit("Where", emitter.emit("IsInf", tensor, label="infinite"), zero, tensor, label="finite")
    flat = emitter.reshape(emitter.emit("Abs", finite, label="magnitude"), (-1,), "flat")
    some = emitter.emit("Concat", zero, flat, label="some", axis=0)
    result: gs.Variable = emitter.emit("ReduceMax", some, label="max", keepdims=0)
    result.dtype, result.shape = np.dtype(np.float32), []
    return result


def _place(node: gs.Node) -> str:
    read = [tensor.name for tensor in node.inputs if isinstance(tensor, gs.Constant) and len(tensor.shape) > 1]
    return f"{place_of(node)} with {read[0]}" if read else place_of(node)
