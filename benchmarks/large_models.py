"""Large MoE models as exporters write them: many layers of many experts, every weight in a data file beside the graph.

Weights repeat one random block, so that gigabytes are written as quickly as the disk takes them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20
BLOCK_BYTES = 1 << 24
ALIGNMENT = 4096


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Layers, and E, K, H and F of each, in ``moe_spec``'s words; float32, SwiGLU."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert: gate, up and down projection."""
        return 3 * self.hidden * self.width * 4


class Builder:
    """Collects nodes and constants; weights go to the data file at once."""

    def __init__(self, data: IO[bytes], location: str, sizes: Sizes) -> None:
        self.sizes, self.layer = sizes, ""
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}
        self._data, self._location = data, location
        scale = np.float32(1 / np.sqrt(sizes.hidden))
        block = np.random.default_rng(0).standard_normal(BLOCK_BYTES // 4, dtype=np.float32) * scale
        self._block = memoryview(block.tobytes())

    def emit(self, op: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        """One node of this layer; its first output. Names starting with ``:`` are those of the whole graph."""
        names = [self._named(name) for name in outputs]
        self.nodes.append(helper.make_node(op, [self._named(name) for name in inputs], names, **attributes))
        return outputs[0]

    def ints(self, *values: int, scalar: bool = False) -> str:
        """A constant that all layers share, as exporters share them."""
        name = ":" + "_".join(("int" if scalar else "ints", *map(str, values)))
        array = np.asarray(values[0] if scalar else values, np.int64)
        self.tensors.setdefault(name[1:], numpy_helper.from_array(array, name[1:]))
        return name

    def zeros(self, length: int) -> str:
        """A float constant that all layers share."""
        name = f":zeros_{length}"
        self.tensors.setdefault(name[1:], numpy_helper.from_array(np.zeros(length, np.float32), name[1:]))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """A float32 weight of this layer, in the data file."""
        self._data.write(b"\0" * (-self._data.tell() % ALIGNMENT))
        left = size = 4 * int(np.prod(shape))
        proto = TensorProto(name=self._named(name), dims=shape, data_type=TensorProto.FLOAT)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._location), ("offset", self._data.tell()), ("length", size)):
            proto.external_data.add(key=key, value=str(value))
        while left > 0:
            left -= self._data.write(self._block[: min(left, BLOCK_BYTES)])
        self.tensors[proto.name] = proto
        return name

    def _named(self, name: str) -> str:
        return name[1:] if name.startswith(":") else f"{self.layer}{name}"


def grouped(build: Builder) -> str:
    """As transformers' own exporter: stacked weights split by expert, the rows of each by Range and Gather."""
    sizes, one = build.sizes, build.ints(1, scalar=True)
    experts = range(sizes.experts)
    build.emit("Reshape", ["ids", build.ints(-1)], "slots")
    build.emit("Shape", ["slots"], "slot_count")
    build.emit("TopK", ["slots", "slot_count"], "ascending", "order", axis=-1, largest=0)
    build.emit("Div", ["order", build.ints(sizes.top_k, scalar=True)], "token")
    build.emit("Unsqueeze", ["token", build.ints(-1)], "token_rows")
    build.emit("GatherND", ["hidden", "token_rows"], "sorted_tokens")
    build.emit("Cast", ["ascending"], "bins_float", to=TensorProto.FLOAT)
    build.emit("Cast", ["bins_float"], "bins", to=TensorProto.INT64)
    zero, last = build.ints(0, scalar=True), build.ints(sizes.experts - 1, scalar=True)
    build.emit("Clip", ["bins", zero, last], "clipped")
    build.emit("Cast", ["clipped"], "clipped_float", to=TensorProto.FLOAT)
    build.emit("Equal", ["clipped", "clipped"], "same")
    build.emit("Cast", ["same"], "ones", to=TensorProto.FLOAT)
    histogram = [build.zeros(sizes.experts), "clipped", "ones"]
    build.emit("ScatterElements", histogram, "histogram", axis=0, reduction="add")
    build.emit("Cast", ["histogram"], "histogram_int32", to=TensorProto.INT32)
    build.emit("CumSum", ["histogram_int32", zero], "offsets_int32")
    build.emit("Cast", ["offsets_int32"], "offsets", to=TensorProto.INT64)
    build.emit("Split", ["offsets"], *(f"bound_{e}" for e in experts), axis=0, num_outputs=sizes.experts)
    start = zero
    for expert in experts:
        end = build.emit("Squeeze", [f"bound_{expert}", build.ints(0)], f"end_{expert}")
        build.emit("Range", [start, end, one], f"range_{expert}")
        start = end
    _grouped_mm(build, "sorted_tokens", build.weight("gate_up", sizes.experts, sizes.hidden, 2 * sizes.width), "both")
    build.emit("Split", ["both"], "gate", "up", axis=1, num_outputs=2)
    _swiglu(build, "")
    _grouped_mm(build, "middle", build.weight("down", sizes.experts, sizes.width, sizes.hidden), "y")
    build.emit("Reshape", ["gates", build.ints(-1)], "slot_gates")
    build.emit("Unsqueeze", ["order", build.ints(-1)], "order_rows")
    build.emit("GatherND", ["slot_gates", "order_rows"], "sorted_gates")
    build.emit("Unsqueeze", ["sorted_gates", build.ints(-1)], "gates_column")
    build.emit("Mul", ["y", "gates_column"], "gated")
    build.emit("Squeeze", ["slot_count", build.ints(0)], "slot_number")
    build.emit("Range", [zero, "slot_number", one], "positions")
    build.emit("Expand", [zero, "slot_count"], "empty")
    build.emit("ScatterND", ["empty", "order_rows", "positions"], "inverse")
    build.emit("Unsqueeze", ["inverse", build.ints(-1)], "inverse_rows")
    build.emit("GatherND", ["gated", "inverse_rows"], "unsorted")
    build.emit("Reshape", ["unsorted", build.ints(-1, sizes.top_k, sizes.hidden)], "by_token")
    return build.emit("ReduceSum", ["by_token", build.ints(1)], "out", keepdims=0)


def _grouped_mm(build: Builder, x: str, weight: str, result: str) -> None:
    experts = range(build.sizes.experts)
    build.emit("Split", [weight], *(f"{result}_w_{e}" for e in experts), axis=0, num_outputs=len(experts))
    for expert in experts:
        build.emit("Gather", [x, f"range_{expert}"], f"{result}_x_{expert}", axis=0)
        build.emit("Squeeze", [f"{result}_w_{expert}", build.ints(0)], f"{result}_m_{expert}")
        build.emit("MatMul", [f"{result}_x_{expert}", f"{result}_m_{expert}"], f"{result}_{expert}")
    build.emit("Concat", [f"{result}_{expert}" for expert in experts], result, axis=0)


def nonzero(build: Builder) -> str:
    """The eager loop of transformers, unrolled: who chose an expert is gathered, its output is added back."""
    depth = build.ints(build.sizes.experts, scalar=True)
    build.emit("OneHot", ["ids", depth, build.ints(0, 1)], "chosen_TKE", axis=-1)
    build.emit("Transpose", ["chosen_TKE"], "chosen_EKT", perm=[2, 1, 0])
    build.emit("Transpose", ["gates"], "gates_KT", perm=[1, 0])
    build.emit("Shape", ["hidden"], "hidden_shape")
    build.emit("Expand", [build.zeros(1), "hidden_shape"], "sum_0")
    for e in range(build.sizes.experts):
        build.emit("Gather", ["chosen_EKT", build.ints(e, scalar=True)], f"chosen_{e}", axis=0)
        build.emit("NonZero", [f"chosen_{e}"], f"places_{e}")
        build.emit("Gather", [f"places_{e}", build.ints(1, scalar=True)], f"token_{e}", axis=0)
        build.emit("Gather", ["hidden", f"token_{e}"], f"x_{e}", axis=0)
        _ffn(build, f"x_{e}", e)
        build.emit("Transpose", [f"places_{e}"], f"slot_token_{e}", perm=[1, 0])
        build.emit("GatherND", ["gates_KT", f"slot_token_{e}"], f"gates_{e}")
        build.emit("Unsqueeze", [f"gates_{e}", build.ints(1)], f"column_{e}")
        build.emit("Mul", [f"y_{e}", f"column_{e}"], f"gated_{e}")
        build.emit("Unsqueeze", [f"token_{e}", build.ints(1)], f"rows_{e}")
        scattered = [f"sum_{e}", f"rows_{e}", f"gated_{e}"]
        build.emit("ScatterND", scattered, f"sum_{e + 1}", reduction="add")
    return f"sum_{build.sizes.experts}"


def masked_loop(build: Builder) -> str:
    """Every expert on every token, times its column of the gates."""
    build.emit("Shape", ["logits"], "logits_shape")
    build.emit("Expand", [build.zeros(1), "logits_shape"], "no_gates")
    build.emit("ScatterElements", ["no_gates", "ids", "gates"], "gates_TE", axis=1)
    total = ""
    for e in range(build.sizes.experts):
        bounds = [build.ints(value) for value in (e, e + 1, 1)]
        build.emit("Slice", ["gates_TE", *bounds], f"column_{e}")
        _ffn(build, "hidden", e)
        gated = build.emit("Mul", [f"y_{e}", f"column_{e}"], f"gated_{e}")
        total = gated if not total else build.emit("Add", [total, gated], f"sum_{e}")
    return total


def _ffn(build: Builder, x: str, e: int) -> None:
    hidden, width = build.sizes.hidden, build.sizes.width
    build.emit("MatMul", [x, build.weight(f"experts.{e}.gate", hidden, width)], f"gate_{e}")
    build.emit("MatMul", [x, build.weight(f"experts.{e}.up", hidden, width)], f"up_{e}")
    _swiglu(build, f"_{e}")
    build.emit("MatMul", [f"middle_{e}", build.weight(f"experts.{e}.down", width, hidden)], f"y_{e}")


def _swiglu(build: Builder, tag: str) -> None:
    build.emit("Sigmoid", [f"gate{tag}"], f"sigmoid{tag}")
    build.emit("Mul", [f"gate{tag}", f"sigmoid{tag}"], f"silu{tag}")
    build.emit("Mul", [f"silu{tag}", f"up{tag}"], f"middle{tag}")


UNROLLED: Mapping[str, Callable[[Builder], str]] = {"grouped": grouped, "nonzero": nonzero, "masked_loop": masked_loop}
"""Forms whose graphs grow with E."""


def save_large(form: str, sizes: Sizes, path: Path) -> None:
    """Write a model ``hidden (T, H) -> out (T, H)`` of residual MoE layers in one of ``UNROLLED``."""
    location = path.name + ".data"
    with (path.parent / location).open("wb") as data:
        build = Builder(data, location, sizes)
        before = ":hidden"
        for layer in range(sizes.layers):
            build.layer = f"layers.{layer}."
            build.emit("Identity", [before], "hidden")
            _router(build)
            after = f":layers.{layer + 1}.residual" if layer + 1 < sizes.layers else ":out"
            before = build.emit("Add", ["hidden", UNROLLED[form](build)], after)
    axes: list[str | int | None] = ["tokens", sizes.hidden]
    hidden, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in ("hidden", "out"))
    graph = helper.make_graph(build.nodes, "large", [hidden], [out], list(build.tensors.values()))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10), path)


def _router(build: Builder) -> None:
    sizes = build.sizes
    build.emit("Gemm", ["hidden", build.weight("gate.weight", sizes.experts, sizes.hidden)], "logits", transB=1)
    build.emit("Softmax", ["logits"], "scores", axis=-1)
    build.emit("TopK", ["scores", build.ints(sizes.top_k)], "best", "ids", axis=-1)
    build.emit("ReduceSum", ["best", build.ints(-1)], "total", keepdims=1)
    build.emit("Div", ["best", "total"], "gates")
