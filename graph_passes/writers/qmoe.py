"""Form ``qmoe``: ``com.microsoft.QMoE``, ONNX Runtime's fused op for experts of 4 or 8 bits.

Weights that are quantised are packed as they are; float ones are quantised before (`quantization.quantize`). A softmax
router over its K best hands over logits. Of any other the op gets the gates, twice: to choose by, and as the weights of
the chosen, so that it expresses every router.
"""

import dataclasses
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.dequantize import repeated, shifted
from graph_passes.graph.emitter import Emitter
from graph_passes.record.block import Experts, MoEBlock
from graph_passes.weights.packing import fill, packed
from graph_passes.weights.weight import Weight, alternate, bits_of, from_array
from graph_passes.writers.expert_math import gate_dtype
from graph_passes.writers.fused import (
    DOMAIN,
    attributes,
    first_bias,
    fold_scale,
    is_divided,
    is_plain,
    optional,
    trimmed,
    why_not_fused,
)
from graph_passes.writers.routing import Routing, emit_logits, emit_routing, gates_of

SMALLEST_BLOCK = 16
UNSIGNED = {"int4": "uint4", "uint4": "uint4", "int8": "uint8", "uint8": "uint8"}


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A projection (E, out, in) of unsigned values; scales and zero points (E, out, blocks); None for the middle."""

    values: Weight
    scales: Weight
    zero_points: Weight | None


def why_not(block: MoEBlock) -> str | None:
    """Why this form cannot express ``block``; None where it can."""
    experts = block.experts
    weights = [weight for weight in (experts.gate_EHF, experts.up_EHF, experts.down_EFH) if weight is not None]
    kinds = {weight.dtype.name for weight in weights}
    if block.router.scale_E is not None:
        return "the op ranks what weighs the experts, and here each has a factor of its own"
    if any(weight.scales is None for weight in weights):
        return "its weights are not quantised; --precision int8 or int4 says how"
    if len(kinds) != 1 or not kinds <= set(UNSIGNED):
        return f"the op takes one integer type of 4 or 8 bits, this layer has {', '.join(sorted(kinds))}"
    size = _block_size(experts)
    if size is not None and (size < SMALLEST_BLOCK or size & (size - 1) or any(w.shape[1] % size for w in weights)):
        return f"the op takes blocks of a power of 2 from {SMALLEST_BLOCK} that divides H and F, this layer has {size}"
    if size is not None and bits_of(weights[0].dtype) == 8 and block.form != "qmoe":  # where it was so before
        return "the CPU kernel rounds what it reads to 8 bits where weights of 8 bits have blocks"
    return why_not_fused(block)


def write(emitter: Emitter, block: MoEBlock) -> tuple[gs.Tensor, Routing]:
    """Nodes that compute ``block.out``, and the routing they use."""
    block = fold_scale(block)
    experts, size = block.experts, _block_size(block.experts)
    first, down = _kernel(experts.up_EHF, size), _kernel(experts.down_EFH, size)
    if experts.gate_EHF is not None:
        first = _alternate(_kernel(experts.gate_EHF, size), first)
    routing, choice, weights = _routing(emitter, block)
    missing = gs.Variable.empty()
    inputs = [
        block.hidden,
        choice,
        *_operands(emitter, "experts.fc1", first, first_bias(experts), blocked=size is not None),
        *_operands(emitter, "experts.fc2", down, experts.down_bias_EH, blocked=size is not None),
        *[missing] * 3,
        _zero_points(emitter, "experts.fc1_zero_points", first, blocked=size is not None),
        _zero_points(emitter, "experts.fc2_zero_points", down, blocked=size is not None),
        missing,
        weights,
    ]
    settings: dict[str, Any] = {
        **attributes(block),
        "expert_weight_bits": bits_of(first.values.dtype),
        "normalize_routing_weights": int(weights.is_empty()),
        **({} if size is None else {"block_size": size}),
    }
    return emitter.fused(DOMAIN, "QMoE", *trimmed(inputs), label="out", **settings), routing


def _routing(emitter: Emitter, block: MoEBlock) -> tuple[Routing, gs.Tensor, gs.Tensor]:
    """What the router hands over, what the op ranks, and the weights of what it chooses."""
    router = block.router
    if is_plain(router) and is_divided(router):
        logits = emit_logits(emitter, block)
        return Routing(logits, fused=router), gate_dtype(emitter, logits, block.experts), gs.Variable.empty()
    routing = emit_routing(emitter, block)
    gates = gate_dtype(emitter, gates_of(emitter, routing, block), block.experts)
    return routing, gates, gates


def _block(weight: Weight) -> int:
    """Inputs of (E, in, out) that share a scale."""
    assert weight.scales is not None
    return weight.shape[1] // weight.scales.shape[1]


def _block_size(experts: Experts) -> int | None:
    """Inputs that share a scale in every projection; None where all inputs do."""
    weights = [weight for weight in (experts.gate_EHF, experts.up_EHF, experts.down_EFH) if weight is not None]
    whole = all(_block(weight) == weight.shape[1] for weight in weights)
    return None if whole else min(_block(weight) for weight in weights)


def _kernel(weight: Weight, size: int | None) -> _Kernel:
    """A quantised (E, in, out), unsigned, with a scale for each output and ``size`` inputs."""
    stored = weight.swap()
    assert stored.scales is not None
    shape = (*stored.shape[:2], 1 if size is None else stored.shape[2] // size)
    middle = 2 ** (bits_of(stored.dtype) - 1)
    offset = 0 if stored.dtype.name.startswith("u") else middle
    values, scales = _raised(stored.values, offset), repeated(stored.scales, shape)
    zeros = _nothing(values.dtype, offset) if stored.zero_points is None else _raised(stored.zero_points, offset)
    if zeros.shape == (1, 1, 1) and int(zeros.load().item()) == middle:
        return _Kernel(values, scales, None)
    return _Kernel(values, scales, repeated(zeros, shape))


def _nothing(dtype: np.dtype[Any], value: int) -> Weight:
    """One zero point for everything."""
    return from_array(np.full((1, 1, 1), value).astype(dtype))


def _raised(weight: Weight, offset: int) -> Weight:
    """Signed values as unsigned ones, ``offset`` higher."""
    return weight if not offset else shifted(weight, offset, UNSIGNED[weight.dtype.name])


def _alternate(gate: _Kernel, up: _Kernel) -> _Kernel:
    """Both as one projection, their outputs in turns."""
    values, scales = alternate(gate.values, up.values), alternate(gate.scales, up.scales)
    if gate.zero_points is None and up.zero_points is None:
        return _Kernel(values, scales, None)
    middle = repeated(_nothing(values.dtype, 2 ** (bits_of(values.dtype) - 1)), gate.scales.shape)
    return _Kernel(values, scales, alternate(gate.zero_points or middle, up.zero_points or middle))


def _operands(
    emitter: Emitter, label: str, kernel: _Kernel, bias: Weight | None, *, blocked: bool
) -> tuple[gs.Tensor, gs.Tensor, gs.Tensor]:
    """Weights, scales and bias of a projection."""
    return (
        emitter.stored(label, packed(kernel.values)),
        emitter.stored(f"{label}_scales", _by_output(kernel.scales, blocked=blocked)),
        optional(emitter, f"{label}_bias", bias),
    )


def _zero_points(emitter: Emitter, label: str, kernel: _Kernel, *, blocked: bool) -> gs.Tensor:
    """Packed along their last axis, which is filled up to whole bytes; left out where they are the middle."""
    if kernel.zero_points is None:
        return gs.Variable.empty()
    zeros = _by_output(kernel.zero_points, blocked=blocked)
    length = zeros.shape[-1]
    missing = -length % (8 // bits_of(zeros.dtype))
    shape = (*zeros.shape[:-1], length + missing)
    whole = zeros.map(shape, lambda rows: fill(rows, shape[-1]), row_wise=True) if missing else zeros
    return emitter.stored(label, packed(whole))


def _by_output(weight: Weight, *, blocked: bool) -> Weight:
    """(E, out, blocks) as it is, or as (E, out) where there are no blocks."""
    return weight if blocked else weight.map(weight.shape[:2], lambda array: array[..., 0], row_wise=True)
