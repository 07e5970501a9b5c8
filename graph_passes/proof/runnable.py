"""Fused ops that ONNX Runtime's CPU provider, which runs the proof, lacks or computes otherwise (measured on 1.31)."""

from collections.abc import Callable, Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.graph.walk import operand
from graph_passes.readers.parts.contrib import HALVES
from graph_passes.record.block import place_of
from moe_spec.errors import UserError

FC3 = {"MoE": 6, "QMoE": 8}
"""Where the third projection stands."""


def _has_fc3(node: gs.Node) -> bool:
    return node.op in FC3 and operand(node, FC3[node.op]) is not None


def _has_halves(node: gs.Node) -> bool:
    return node.op in FC3 and node.attrs.get("swiglu_fusion", 0) == HALVES


def _is_sparse(node: gs.Node) -> bool:
    return node.op in FC3 and bool(node.attrs.get("use_sparse_mixer", 0))


def _is_zero(node: gs.Node) -> bool:
    half = node.op == "MoE" and node.inputs[2].dtype in (np.float16, onnx.TensorProto.FLOAT16)
    return half and not node.attrs.get("normalize_routing_weights", 0)


def _is_trt(node: gs.Node) -> bool:
    return bool(node.op == "TRT_MoE")


LIMITS: tuple[tuple[str, Callable[[gs.Node], bool]], ...] = (
    ("only TensorRT has this op", _is_trt),
    ("its CPU kernel has no fc3", _has_fc3),
    ("its CPU kernel wants gate and up in turns (swiglu_fusion 1)", _has_halves),
    ("its CPU kernel ignores use_sparse_mixer", _is_sparse),
    ("its CPU kernel gives zeros in float16 unless it renormalises", _is_zero),
)


def check_runnable(nodes: Iterable[gs.Node], model: str) -> None:
    """Refuse a proof that would fail, or say nothing, because of the runner.

    Raises:
        UserError: a node is one of `LIMITS`.
    """
    for node in nodes:
        for reason, applies in LIMITS:
            if applies(node):
                raise UserError(
                    f"{model} cannot be proven here: ONNX Runtime does not run {place_of(node)}: {reason}",
                    hint="--no-prove writes the result without a proof; compare it where that op runs",
                )
