"""Every expert on every token, with MatMul or Einsum over stacked weights, weighed by (T, E) gates."""

from tests.graph_passes.block_models import ffn
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.gates import gates


def emit(block: Block) -> str:
    gates_TE = gates(block)
    return _with_einsum(block, gates_TE) if block.spec.einsum else _with_matmul(block, gates_TE)


def _with_matmul(block: Block, gates_TE: str) -> str:
    spec, b = block.spec, block.b
    gates_ET = b.op("Transpose", gates_TE, perm=[1, 0])
    hidden = _repeated(block, gates_ET)
    outputs = ffn.stacked_matmul(block, hidden)
    if spec.weights_on == "input":
        return torch.half_total(b, outputs, 0, is_float=False)
    gated = b.op("Mul", _in_weights_type(block, outputs), b.op("Unsqueeze", gates_ET, [-1]))
    return torch.half_total(b, gated, 0, is_float=spec.weights_float)


def _repeated(block: Block, gates_ET: str) -> str:
    """(E, T, H) or (1, T, H): the tokens for each expert, weighed here where the spec says so."""
    spec, b = block.spec, block.b
    if not spec.tiled:
        once = b.op("Unsqueeze", block.hidden, [0])
        return b.op("Mul", once, b.op("Unsqueeze", gates_ET, [-1])) if spec.weights_on == "input" else once
    repeated = b.op("Tile", b.op("Expand", block.hidden, [1, 1]), [spec.experts, 1], out="repeat")
    if spec.weights_on == "input":
        repeated = b.op("Mul", repeated, torch.reshape(b, gates_ET, [-1, 1]))
    return torch.reshape(b, repeated, [spec.experts, -1, spec.hidden])


def _with_einsum(block: Block, gates_TE: str) -> str:
    spec, b = block.spec, block.b
    if spec.weights_on == "input":
        hidden = b.op("Mul", b.op("Unsqueeze", block.hidden, [1]), b.op("Unsqueeze", gates_TE, [-1]))
        outputs = ffn.stacked_einsum(block, hidden, "teh", "tef", "teh")
        return torch.half_total(b, outputs, 1, is_float=False)
    outputs = ffn.stacked_einsum(block, block.hidden, "th", "tef", "teh")
    summed = b.op("Einsum", gates_TE, _in_weights_type(block, outputs), equation="te,teh->th")
    return torch.to_model(b, summed) if spec.weights_float else summed


def _in_weights_type(block: Block, outputs: str) -> str:
    return torch.to_float(block.b, outputs) if block.spec.weights_float else outputs
