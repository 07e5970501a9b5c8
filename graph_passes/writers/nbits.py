"""``com.microsoft.MatMulNBits`` again for weights that came from one: ``x (rows, in) @ weight``, bytes as they were."""

import onnx_graphsurgeon as gs

from graph_passes.graph.emitter import Emitter
from graph_passes.weights.packing import fill, packed
from graph_passes.weights.weight import Weight, bits_of

DOMAIN = "com.microsoft"


def matmul_nbits(
    emitter: Emitter, x: gs.Tensor, weight: Weight, bias: Weight | None, name: str, label: str
) -> gs.Tensor:
    """``x @ weight (in, out) + bias (out,)``; scales are (blocks, out), zero points likewise, or (1, 1) for all."""
    assert weight.scales is not None
    inputs, outputs = weight.shape
    blocks, bits = weight.scales.shape[0], bits_of(weight.dtype)
    size = inputs // blocks
    octets = packed(_by_output(weight.values))
    kernel = octets.map((outputs, blocks, size * bits // 8), lambda rows: rows.reshape(-1, blocks, size * bits // 8))
    operands = [x, emitter.stored(name, kernel), emitter.stored(f"{name}_scale", _by_output(weight.scales))]
    zeros = weight.zero_points
    if zeros is not None and zeros.shape == weight.scales.shape:
        each = 8 // bits
        padded = -(-blocks // each) * each
        whole = _by_output(zeros).map((outputs, padded), lambda rows: fill(rows, padded))
        operands.append(emitter.stored(f"{name}_zero_point", packed(whole)))
    product = emitter.fused(
        DOMAIN,
        "MatMulNBits",
        *operands,
        label=label if bias is None else f"{label}_product",
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=size,
        accuracy_level=weight.matmul_nbits,
    )
    return product if bias is None else emitter.emit("Add", product, emitter.weight(f"{name}_bias", bias), label=label)


def _by_output(weight: Weight) -> Weight:
    """(in, out) as (out, in)."""
    return weight.swap() if weight.swapped else weight.map(weight.shape[::-1], lambda array: array.T)
