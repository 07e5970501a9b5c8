"""Capacity dispatch and combine, as in Switch and V-MoE: each expert has C places, filled and emptied by Einsum.

::

    dispatch (G, S, E, C): 1 where token s of sequence g has place c of expert e        combine: its weight there
    experts read Einsum(dispatch, x) (E, G, C, H)                                       out = Einsum(combine, outputs)

Switch numbers the places of a token's only expert and masks those beyond the capacity; V-MoE numbers all first choices
before all second ones, and a one-hot of a place that is not there is empty. Without a capacity, C is S: nothing drops.
"""

import numpy as np
from onnx import TensorProto

from tests.graph_passes.block_models import ffn, routers
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.gates import weights_type


def emit(block: Block) -> str:
    spec, b = block.spec, block.b
    x = block.x if spec.rank == 3 else b.op("Unsqueeze", block.hidden, [0])
    dispatch, combine = DISPATCHERS[spec.selection](block, x)
    inputs = b.op("Einsum", b.op("Cast", dispatch, to=b.element_type), x, equation="gsec,gsh->egch")
    if spec.einsum:
        outputs = ffn.stacked_einsum(block, inputs, "egch", "egcf", "egch", bias_axes=[1, 2])
    else:
        outputs = _with_matmul(block, inputs)
    outputs = torch.to_float(b, outputs) if spec.weights_float else outputs
    summed = b.op("Einsum", combine, outputs, equation="gsec,egch->gsh")
    return torch.reshape(b, torch.to_model(b, summed) if spec.weights_float else summed, [-1, spec.hidden])


def _switch(block: Block, x: str) -> tuple[str, str]:
    """Dispatch and combine (G, S, E, C) of one choice a token."""
    spec, b = block.spec, block.b
    routed = routers.slots(block)
    mask = torch.one_hot(b, _by_sequence(block, x, routed.ids), spec.experts)
    places = b.op("Mul", b.op("CumSum", mask, np.asarray(1), exclusive=0, reverse=0), mask)
    if spec.capacity is not None:
        within = b.op("LessOrEqual", places, np.asarray(spec.capacity), out="le")
        mask = b.op("Mul", mask, b.op("Cast", within, to=TensorProto.INT64))
    place = b.op("Equal", b.op("Unsqueeze", b.op("Sub", places, np.asarray(1)), [-1]), _places(block, x), out="eq")
    taken = b.op("Mul", b.op("Unsqueeze", mask, [-1]), b.op("Cast", place, to=TensorProto.INT64))
    dispatch = b.op("Cast", taken, to=weights_type(block))
    weights = b.op("Unsqueeze", _by_sequence(block, x, routed.weights), [2, 3])
    return dispatch, b.op("Mul", dispatch, weights)


def _vmoe(block: Block, x: str) -> tuple[str, str]:
    """Dispatch and combine (G, S, E, C) of K choices a token."""
    spec, b = block.spec, block.b
    K, E = spec.top_k, spec.experts
    routed = routers.slots(block)
    mask_GSKE = torch.one_hot(b, _by_sequence(block, x, routed.ids, K), E)
    mask_GKSE = b.op("Transpose", mask_GSKE, perm=[0, 2, 1, 3])
    by_rank = b.op("Reshape", mask_GKSE, b.op("Concat", b.op("Shape", x, start=0, end=1), [-1, E], axis=0))
    running = b.op("CumSum", by_rank, np.asarray(1), exclusive=0, reverse=0)
    counted = b.op("Sub", b.op("Mul", running, by_rank), np.asarray(1))
    places_GKSE = b.op("Reshape", counted, b.op("Shape", mask_GKSE, start=0))
    places_GSKE = b.op("Transpose", places_GKSE, perm=[0, 2, 1, 3])
    hit = b.op("Equal", b.op("Unsqueeze", places_GSKE, [-1]), _places(block, x), out="eq")
    hot_GSKEC = b.op("Cast", hit, to=weights_type(block))
    weights = b.op("Unsqueeze", _by_sequence(block, x, routed.weights, K), [3, 4])
    return torch.total(b, hot_GSKEC, 2), torch.total(b, b.op("Mul", hot_GSKEC, weights), 2)


def _places(block: Block, x: str) -> str:
    """``[0 ... C - 1]``."""
    b, capacity = block.b, block.spec.capacity
    if capacity is not None:
        return torch.arange(b, capacity)
    length = b.op("Squeeze", b.op("Shape", x, start=1, end=2))
    return b.op("Range", np.asarray(0), length, np.asarray(1), out="arange")


def _by_sequence(block: Block, x: str, slots: str, *trailing: int) -> str:
    """(T, K) as (G, S, K), or (T, 1) as (G, S)."""
    b = block.b
    lengths = b.op("Shape", x, start=0, end=2)
    return b.op("Reshape", slots, b.op("Concat", lengths, trailing, axis=0) if trailing else lengths)


def _with_matmul(block: Block, inputs: str) -> str:
    spec, b = block.spec, block.b
    rows = torch.reshape(b, inputs, [spec.experts, -1, spec.hidden])
    outputs = ffn.stacked_matmul(block, rows)
    if spec.capacity is None:
        return b.op("Reshape", outputs, b.op("Shape", inputs, start=0))
    return torch.reshape(b, outputs, [spec.experts, -1, spec.capacity, spec.hidden])


DISPATCHERS = {"argmax": _switch, "topk": _vmoe, "sparsemixer": _vmoe}
