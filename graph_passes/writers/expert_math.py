"""The ops inside an expert, shared by every form: projections and the activation between them."""

import dataclasses

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import Experts
from graph_passes.weights.weight import Weight
from graph_passes.writers.nbits import matmul_nbits
from moe_spec.experts_op import NO_LIMIT, Activation


def linear(emitter: Emitter, x: gs.Tensor, weight: Weight, bias: Weight | None, name: str, label: str) -> gs.Tensor:
    """``x (rows, in) @ weight (in, out) + bias (out,)``; a weight that lies as (out, in) is not transposed."""
    if weight.matmul_nbits is not None:
        return matmul_nbits(emitter, x, weight, bias, name, label)
    kernel = emitter.weight(name, weight.swap() if weight.swapped else weight)
    if bias is None and not weight.swapped:
        return emitter.emit("MatMul", x, kernel, label=label)
    added = [] if bias is None else [emitter.weight(f"{name}_bias", bias)]
    return emitter.emit("Gemm", x, kernel, *added, label=label, transB=int(weight.swapped))


def single_ffn(emitter: Emitter, x: gs.Tensor, experts: Experts, index: int, name: str, mark: str = "") -> gs.Tensor:
    """Expert ``index`` on ``x (rows, H)``; ``mark`` ends the labels of its nodes."""

    def project(x: gs.Tensor, weight: Weight, bias: Weight | None, part: str) -> gs.Tensor:
        added = None if bias is None else bias.one(index)
        return linear(emitter, x, weight.one(index), added, f"{name}.{part}", f"{part}{mark}")

    gate = None if experts.gate_EHF is None else project(x, experts.gate_EHF, experts.gate_bias_EF, "gate")
    up = project(x, experts.up_EHF, experts.up_bias_EF, "up")
    return project(activate(emitter, gate, up, experts), experts.down_EFH, experts.down_bias_EH, "down")


def activate(emitter: Emitter, gate: gs.Tensor | None, up: gs.Tensor, experts: Experts) -> gs.Tensor:
    """``act(gate) * (up + offset)``, or ``act(up)`` without a gate; clamped first where the activation says so."""
    activation, like = experts.activation, experts.up_EHF
    if activation.limit != NO_LIMIT:
        high, low = emitter.number(activation.limit, like), emitter.number(-activation.limit, like)
        gate = None if gate is None else emitter.emit("Min", gate, high, label="gate_clamped")
        up = emitter.emit("Max", emitter.emit("Min", up, high, label="up_below"), low, label="up_clamped")
    if gate is None:
        return _act(emitter, up, activation, like)
    if activation.up_offset:
        up = emitter.emit("Add", up, emitter.number(activation.up_offset, like), label="up_offset")
    return emitter.emit("Mul", _act(emitter, gate, activation, like), up, label="middle")


def _act(emitter: Emitter, x: gs.Tensor, activation: Activation, like: Weight) -> gs.Tensor:
    match activation.kind:
        case "silu":
            scaled = x
            if activation.alpha != 1.0:
                scaled = emitter.emit("Mul", x, emitter.number(activation.alpha, like), label="alpha_x")
            return emitter.emit("Mul", x, emitter.emit("Sigmoid", scaled, label="sigmoid"), label="silu")
        case "gelu":
            return _erf_gelu(emitter, x, like)
        case "gelu_tanh":
            return _tanh_gelu(emitter, x, like)
        case "relu":
            return emitter.emit("Relu", x, label="relu")
        case "relu2":
            positive = emitter.emit("Relu", x, label="relu")
            return emitter.emit("Mul", positive, positive, label="relu2")
    raise AssertionError(activation.kind)


def _erf_gelu(emitter: Emitter, x: gs.Tensor, like: Weight) -> gs.Tensor:
    """Exact gelu in ops of every opset since 9; runtimes fuse it."""
    root = emitter.emit("Div", x, emitter.number(float(np.sqrt(2.0)), like), label="x_over_root2")
    erf = emitter.emit("Erf", root, label="erf")
    shifted = emitter.emit("Add", erf, emitter.number(1.0, like), label="erf_plus_1")
    half = emitter.emit("Mul", x, emitter.number(0.5, like), label="half_x")
    return emitter.emit("Mul", half, shifted, label="gelu")


def _tanh_gelu(emitter: Emitter, x: gs.Tensor, like: Weight) -> gs.Tensor:
    """``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))``."""
    square = emitter.emit("Mul", x, x, label="x2")
    cube = emitter.emit("Mul", square, x, label="x3")
    bent = emitter.emit("Mul", cube, emitter.number(0.044715, like), label="bent")
    inner = emitter.emit("Add", x, bent, label="x_bent")
    scaled = emitter.emit("Mul", inner, emitter.number(float(np.sqrt(2 / np.pi)), like), label="scaled_x")
    shifted = emitter.emit("Add", emitter.emit("Tanh", scaled, label="tanh"), emitter.number(1.0, like), label="tanh_1")
    half = emitter.emit("Mul", x, emitter.number(0.5, like), label="half_x")
    return emitter.emit("Mul", half, shifted, label="gelu")


def scaled(weight: Weight, factor: float) -> Weight:
    """``weight`` times ``factor``: the scales times ``factor`` where it is quantised."""
    if factor == 1.0:
        return weight
    if weight.scales is not None:
        return dataclasses.replace(weight, scales=scaled(weight.scales, factor))
    return weight.map(weight.shape, lambda array: (array * array.dtype.type(factor)).astype(array.dtype), row_wise=True)


def gate_dtype(emitter: Emitter, gates: gs.Tensor, experts: Experts) -> gs.Tensor:
    """float32 gates in the experts' dtype."""
    if experts.up_EHF.float_dtype == np.float32:
        return gates
    to = onnx.helper.np_dtype_to_tensor_dtype(experts.up_EHF.float_dtype)
    return emitter.emit("Cast", gates, label="gates_cast", to=to)
