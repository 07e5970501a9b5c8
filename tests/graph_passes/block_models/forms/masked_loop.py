"""One branch an expert, every token through each, weighed by the expert's column of the (T, E) gates."""

from tests.graph_passes.block_models import ffn
from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.gates import gates, weights_type


def emit(block: Block) -> str:
    columns = _columns(block, gates(block))
    return TOTALS[block.spec.total](block, [_branch(block, expert, gate) for expert, gate in enumerate(columns)])


def _branch(block: Block, expert: int, gate: str) -> str:
    """``gate * experts[expert](hidden)``, or ``experts[expert](gate * hidden)``."""
    spec, b = block.spec, block.b
    if spec.weights_on == "input":
        return ffn.one_expert(block, b.op("Mul", block.hidden, gate), expert)
    outputs = ffn.one_expert(block, block.hidden, expert)
    return b.op("Mul", gate, torch.to_float(b, outputs) if spec.weights_float else outputs)


def _columns(block: Block, gates_TE: str) -> list[str]:
    """(T, 1) for each expert."""
    spec, b = block.spec, block.b
    if spec.column == "split":
        return torch.split(b, gates_TE, 1, spec.experts)
    if spec.column == "gather":
        return [b.op("Unsqueeze", torch.select(b, gates_TE, 1, expert), [1]) for expert in range(spec.experts)]
    return [torch.columns(b, gates_TE, expert, expert + 1) for expert in range(spec.experts)]


def _add(block: Block, branches: list[str]) -> str:
    summed = torch.zeros_like(block.b, block.hidden, weights_type(block))
    for branch in branches:
        summed = block.b.op("Add", summed, branch)
    return _finished(block, summed)


def _sum(block: Block, branches: list[str]) -> str:
    return _finished(block, block.b.op("Sum", *branches))


def _stack(block: Block, branches: list[str]) -> str:
    b = block.b
    stacked = b.op("Concat", *(b.op("Unsqueeze", branch, [1]) for branch in branches), out="stack", axis=1)
    return torch.half_total(b, stacked, 1, is_float=block.spec.weights_float)


def _finished(block: Block, summed: str) -> str:
    return torch.to_model(block.b, summed) if block.spec.weights_float else summed


TOTALS = {"add": _add, "sum": _sum, "stack": _stack}
