"""transformers' ``batched_mm``: the weights of its expert gathered for each (token, slot)."""

from tests.graph_passes.block_models import ffn, parameters, routers
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block


def emit(block: Block) -> str:
    spec, b = block.spec, block.b
    routed = routers.slots(block)
    repeated = b.op("Expand", b.op("Unsqueeze", block.hidden, [1]), [1, spec.top_k, 1])
    tokens = b.op("Reshape", repeated, [-1, spec.hidden], out="repeat_interleave", allowzero=0)
    ids = torch.reshape(b, routed.ids, [-1])
    projected = [_project(block, tokens, ids, part) for part in block.matrices if part != "down_proj"]
    outputs = _project(block, ffn.middle(b, projected, rank=2), ids, "down_proj")
    weights = b.op("Unsqueeze", torch.reshape(b, routed.weights, [-1]), [-1])
    gated = b.op("Mul", torch.to_float(b, outputs) if spec.weights_float else outputs, weights)
    by_token = torch.reshape(b, gated, [-1, spec.top_k, spec.hidden])
    return torch.half_total(b, by_token, 1, is_float=spec.weights_float)


def _project(block: Block, x: str, ids: str, part: str) -> str:
    spec, b = block.spec, block.b
    gathered = torch.index(b, parameters.stacked(block, part, transposed=spec.transposed), 3, ids)
    axis = 1 if spec.transposed else -1
    column = b.op("Unsqueeze", x, [axis])
    product = b.op("MatMul", *((column, gathered) if spec.transposed else (gathered, column)), out="bmm")
    result = b.op("Squeeze", product, [axis])
    if not block.vectors:
        return result
    biased = b.op("Add", result, torch.index(b, parameters.stacked_bias(block, part), 2, ids))
    return b.op("Squeeze", b.op("Unsqueeze", biased, [axis]), [axis])  # added in place to a view of the product
