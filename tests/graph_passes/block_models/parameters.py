"""How the experts' weights stand in the graph: as they are, behind a Transpose, or quantised."""

from typing import Any

import ml_dtypes
import numpy as np

from tests.graph_passes.block_models import torch_ops as torch
from tests.graph_passes.block_models.block import Block
from tests.graph_passes.block_models.builder import MICROSOFT
from tests.graph_passes.block_models.quantize import FP8, IN_BLOCKS, Quantized, pack


def stacked(block: Block, part: str, *, transposed: bool) -> str:
    """(E, in, out) of a projection where ``transposed``, else (E, out, in)."""
    b, name = block.b, block.parameter(part)
    matrix, turned = block.matrices[part], transposed and not block.spec.transposed
    if block.spec.quantization is not None:
        if turned and block.spec.unoptimised:
            return b.op("Transpose", _dequantized(block, name, block.quantized[part], transposed=False), perm=[0, 2, 1])
        return _dequantized(block, name, block.quantized[part], transposed=transposed)
    if turned:
        return torch.transposed(b, name, matrix)
    return b.weight(name, matrix.transpose(0, 2, 1) if transposed else matrix)


def stacked_bias(block: Block, part: str) -> str:
    """(E, out)."""
    return block.b.weight(block.parameter(f"{part}_bias"), block.vectors[part])


def project(block: Block, x: str, part: str, expert: int) -> str:
    """``x @ matrix.T + bias`` (rows, out) with the projection of one expert."""
    spec, b = block.spec, block.b
    name = block.parameter(f"{expert}.{part}")
    bias = block.vectors[part][expert] if block.vectors else None
    if spec.quantization == "matmulnbits":
        return _plus(block, _matmul_nbits(block, x, name, _of(block.quantized[part], expert)), name, bias)
    if spec.quantization is not None:
        transposed = spec.linear == "matmul"
        matrix = _dequantized(block, f"{name}.weight", _of(block.quantized[part], expert), transposed=transposed)
        if transposed:
            return _plus(block, b.op("MatMul", x, matrix, out="linear"), name, bias)
        return b.op("Gemm", x, matrix, *([] if bias is None else [b.weight(f"{name}.bias", bias)]), transB=1)
    if spec.sliced:
        return _sliced(block, x, part, expert)
    return torch.linear(b, x, name, block.matrices[part][expert], bias)


def _sliced(block: Block, x: str, part: str, expert: int) -> str:
    """The matrix taken out of the stacked ones, as torch does for ``gate_up_proj[expert]``."""
    b = block.b
    matrix = torch.select(b, stacked(block, part, transposed=block.spec.transposed), 0, expert)
    rows = [x, matrix]
    if block.vectors:
        rows.append(torch.select(b, stacked_bias(block, part), 0, expert))
    return b.op("Gemm", *rows, out="linear", transB=0 if block.spec.transposed else 1)


def _plus(block: Block, product: str, name: str, bias: np.ndarray | None) -> str:
    return product if bias is None else block.b.op("Add", product, block.b.weight(f"{name}.bias", bias))


def _of(quantized: Quantized, expert: int) -> Quantized:
    """One expert's (1, out, in)."""
    own = slice(expert, expert + 1)
    zero_points = None if quantized.zero_points is None else quantized.zero_points[own]
    return Quantized(quantized.codes[own], quantized.scales[own], zero_points)


def _dequantized(block: Block, name: str, quantized: Quantized, *, transposed: bool) -> str:
    """DequantizeLinear of (E, out, in), or of (out, in) where that is one expert of a form with 2-D weights."""
    spec, b = block.spec, block.b
    codes, zero_points = _stored(spec.quantization, quantized)
    arrays = [codes, quantized.scales, *([] if zero_points is None else [zero_points])]
    if spec.form in ("masked_loop", "nonzero"):
        arrays = [array[0] for array in arrays]
    attributes: dict[str, Any] = {"axis": arrays[0].ndim - 1, "block_size": spec.block}
    if spec.quantization not in IN_BLOCKS:
        arrays[1:] = [array.reshape(-1) for array in arrays[1:]]
        attributes = {"axis": 0}
    if transposed:
        arrays = [np.swapaxes(array, -1, -2) if array.ndim > 1 else array for array in arrays]
        attributes["axis"] = _swapped(attributes["axis"], arrays[0].ndim)
    suffixes = ("", "_scale", "_zero_point")
    operands = [b.weight(name + suffix, array) for suffix, array in zip(suffixes, arrays, strict=False)]
    return b.op("DequantizeLinear", *operands, **attributes)


def _swapped(axis: int, rank: int) -> int:
    """Where an axis is when the last two have changed places."""
    return {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis)


def _stored(kind: str | None, quantized: Quantized) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes and zero points in the types that stand in the file; zero points of 0 are left out."""
    match kind:
        case "int8":
            return (quantized.codes.astype(np.int16) - 128).astype(np.int8), None
        case "int4":
            return (quantized.codes.astype(np.int8) - 8).astype(ml_dtypes.int4), None
        case "uint8":
            return quantized.codes, quantized.zero_points
        case _:
            assert kind == FP8, kind
            return quantized.codes, None


def _matmul_nbits(block: Block, x: str, name: str, quantized: Quantized) -> str:
    """ONNX Runtime's product with one expert's matrix of 4 bits."""
    spec, b = block.spec, block.b
    _, rows, columns = quantized.codes.shape
    packed = pack(quantized.codes[0].reshape(rows, columns // spec.block, spec.block))
    operands = [b.weight(f"{name}.weight_Q4", packed), b.weight(f"{name}.weight_scales", quantized.scales[0])]
    if spec.zero_points:
        assert quantized.zero_points is not None
        operands.append(b.weight(f"{name}.weight_zero_points", pack(quantized.zero_points[0])))
    sizes: dict[str, Any] = {"K": columns, "N": rows, "bits": 4, "block_size": spec.block}
    return b.op("MatMulNBits", x, *operands, domain=MICROSOFT, **sizes)
