"""Reader for ``com.microsoft.QMoE``: ``MoE`` with weights of 4 or 8 bits, which are taken as they lie.

A weight (E, out, in * bits / 8) uint8 holds ``(value - zero_point) * scale``, two 4-bit values in a byte, the first in
the low bits. Scales are (E, out), or (E, out, blocks) where runs of ``block_size`` inputs share one; zero points are
packed likewise, and 8 or 128 where they are left out.

The K best logits are taken and their softmax divides by their own sum, whatever ``normalize_routing_weights`` says
(measured on the CPU kernel, tests/graph_passes/readers/test_qmoe.py); with ``router_weights`` (T, E), these are the
weights of the K that the logits choose.
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand, source
from graph_passes.readers.parts.contrib import (
    DOMAIN,
    Projections,
    check_logits,
    dtype_of,
    experts_of,
    integer,
    leading_axes,
    optional,
    sparse,
)
from graph_passes.readers.parts.quantized import INTEGERS
from graph_passes.record.block import FormError, MoEBlock, Router
from graph_passes.routers import Weights, read_gates, read_logits, read_ranked
from graph_passes.routers.finish import read_finish
from graph_passes.weights.packing import unpacked
from graph_passes.weights.weight import Array, Weight, from_array

FORM = "qmoe"
LOOKS_FOR = "com.microsoft.QMoE node"

FC1, FC2, FC3 = (2, 3, 4, 11), (5, 6, 7, 12), (8, 9, 10, 13)
"""Where weights, scales, bias and zero points of each projection stand."""

ROUTER_WEIGHTS = 14


def anchors(graph: gs.Graph) -> list[gs.Node]:
    """The fused nodes."""
    return [node for node in graph.nodes if node.op == "QMoE" and node.domain == DOMAIN]


def read(node: gs.Node, name: str, weights: Weights) -> MoEBlock:
    """The block around ``node``; the bytes of its weights stay what they are.

    Raises:
        FormError: a router, an activation, a layout or a number of bits that is not known.
    """
    if node.attrs.get("quant_type", "int") != "int":
        raise FormError(f"quant_type is {node.attrs['quant_type']!r}, expected 'int'", node)
    fc1, fc2, fc3 = (_projection(node, places, index, weights) for index, places in enumerate((FC1, FC2, FC3), 1))
    if fc1 is None or fc2 is None:
        raise FormError("fc1 or fc2 is left out", node)
    biases = (optional(node, places[2], weights) for places in (FC1, FC2, FC3))
    experts = experts_of(node, Projections(fc1, fc2, fc3, *biases))
    router = _router(node, weights)
    return MoEBlock(
        name=router.scope or name,
        form=FORM,
        hidden=node.inputs[0],
        out=node.outputs[0],
        router=router,
        experts=experts,
        keep=tuple(range(router.weight_EH.shape[0])),
        shaped_like=leading_axes(node.inputs[0]),
    )


def _projection(node: gs.Node, places: tuple[int, int, int, int], index: int, weights: Weights) -> Weight | None:
    """(E, out, in) with its scales and zero points."""
    stored, scales, _, zero_points = (None if part == places[2] else optional(node, part, weights) for part in places)
    if stored is None:
        return None
    bits = integer(node, f"fc{index}_expert_weight_bits", integer(node, "expert_weight_bits", 4))
    if bits not in INTEGERS or scales is None or stored.dtype != np.uint8 or len(stored.shape) != 3:
        raise FormError(f"fc{index} has {bits} bits, expected uint8 (E, out, in) of 4 or 8 bits with scales", node)
    values = unpacked(stored, INTEGERS[bits])
    experts, rows, columns = values.shape
    block = integer(node, "block_size", 0)
    blocks = columns // block if block > 0 and len(scales.shape) == 3 else 1
    if scales.shape not in ((experts, rows), (experts, rows, blocks)) or (blocks > 1 and columns % block):
        raise FormError(f"fc{index} of shape {list(values.shape)} has scales {list(scales.shape)}", node)
    read = dtype_of(node.inputs[0])  # the op dequantises to it, whatever the scales are
    return dataclasses.replace(
        values,
        cast_to=None if read == scales.dtype else read,
        scales=scales if len(scales.shape) == 3 else scales.map((experts, rows, 1), _column, row_wise=True),
        zero_points=_zero_points(node, zero_points, (experts, rows, blocks), bits),
    )


def _zero_points(node: gs.Node, packed: Weight | None, shape: tuple[int, int, int], bits: int) -> Weight:
    """(E, out, blocks), or the middle of the range for all."""
    dtype = np.dtype(INTEGERS[bits])
    if packed is None:
        return from_array(np.full((1, 1, 1), 2 ** (bits - 1)).astype(dtype))
    values = unpacked(packed, dtype)
    along = shape[:2] if len(packed.shape) == 2 else shape
    if values.shape[:-1] != along[:-1] or not 0 <= values.shape[-1] - along[-1] < 8 // bits:
        raise FormError(f"zero points have shape {list(packed.shape)}, expected those of scales {list(shape)}", node)
    return values.map(shape, lambda rows: rows[..., : along[-1]].reshape(-1, *shape[1:]), row_wise=True)


def _router(node: gs.Node, weights: Weights) -> Router:
    top_k, renormalize = integer(node, "k", 1), bool(integer(node, "normalize_routing_weights", 0))
    scores = operand(node, ROUTER_WEIGHTS)
    if scores is None:
        router = read_logits(node.inputs[1], top_k=top_k, renormalize=True, weights_of=weights)
    elif source(scores) is source(node.inputs[1]):
        router = _gates(node, read_gates(scores, weights), top_k, renormalize)
    else:
        router = _scores(node, scores, top_k, renormalize, weights)
    check_logits(node, router)
    return sparse(node, router)


def _gates(node: gs.Node, gates: Router, top_k: int, renormalize: bool) -> Router:
    """Ranked by the gates themselves: those of the selected experts are what is not 0."""
    if gates.top_k == gates.weight_EH.shape[0] != top_k:  # scores of all experts, of which the op takes the best
        if gates.renormalize and not renormalize:
            raise FormError("router_weights are divided by the sum of all", node)
        return dataclasses.replace(gates, top_k=top_k, renormalize=renormalize, gates=None)
    if gates.top_k != top_k or renormalize:
        raise FormError(f"k is {top_k}, but router_weights are the gates of {gates.top_k} experts", node)
    return gates


def _scores(node: gs.Node, scores: gs.Tensor, top_k: int, renormalize: bool, weights: Weights) -> Router:
    """noaux_tc (https://arxiv.org/abs/2412.19437): ranked with a bias and within groups, weighed without."""
    base, finish = read_finish(scores)
    if finish.renormalize:
        raise FormError("router_weights are divided by the sum of all", node)
    router = read_ranked(node.inputs[1], base, top_k=top_k, renormalize=renormalize, weights_of=weights)
    return router if renormalize else dataclasses.replace(router, scale=finish.scale)


def _column(rows: Array) -> Array:
    return rows[..., None]
