"""Recognise a router from the ids and weights that it hands to the experts.

Read backwards, ``weights`` is::

    [scale *] [a / (sum(a) + eps), renormalised]    of a =
        values of TopK(score(logits))               softmax or sigmoid, then top-k
        Softmax(values of TopK(logits))             top-k, then softmax
        GatherElements(score(logits), ids)          where a selection bias or groups decide the ids

and ``ids`` are the indices of that TopK. Casts and reshapes are stepped over.
"""

import dataclasses
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from graph_passes.block import SCORE_FIRST, TOPK_FIRST, FormError, Router, Slots
from graph_passes.stored import of_constant
from graph_passes.walk import (
    SHAPE_ONLY,
    is_weight,
    operand,
    produced_by,
    producer,
    scalar,
    source,
    split_constant,
)
from graph_passes.weights import Weight
from moe_spec.feasibility import Groups

SCORES = {"Softmax": "softmax", "Sigmoid": "sigmoid"}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Gives readers the weights of a model in ``directory``."""

    directory: Path

    def of(self, constant: gs.Tensor) -> Weight:
        """The weight behind ``constant``.

        Raises:
            FormError: it is computed.
        """
        if not isinstance(constant, gs.Constant):
            raise FormError("a weight is no constant", producer(constant) or constant)
        return of_constant(constant, self.directory)

    def flat(self, constant: gs.Constant, length: int) -> Weight:
        """``constant`` of shape (length,) or (1, length) as (length,)."""
        weight = self.of(constant)
        if int(np.prod(weight.shape)) != length:
            raise FormError(f"a router vector has shape {list(weight.shape)}, expected [{length}]", constant)
        return weight if weight.shape == (length,) else weight.map((length,), np.ravel).cached()


def read_router(ids: gs.Tensor, weights: gs.Tensor, weights_of: Weights) -> Router:
    """The router behind ``ids`` (T, K) and ``weights`` (T, K).

    Raises:
        FormError: with the first thing that is no step of a known router.
    """
    topk = produced_by(source(ids), "TopK")
    if topk is None or topk.outputs[1] is not source(ids):
        raise FormError("the expert ids are not the indices of a TopK", producer(source(ids)))
    base, scale = _strip_scale(source(weights))
    base, renormalize, eps = _strip_renormalisation(base)
    choice, groups = _strip_groups(topk.inputs[0])
    score, order, logits, bias = _read_scores(base, topk, choice)
    hidden, weight, logit_bias, scope = _read_linear(logits, weights_of)
    experts = weight.shape[0]
    return Router(
        scope=scope,
        weight_EH=weight,
        bias_E=logit_bias,
        selection_bias_E=None if bias is None else weights_of.flat(bias, experts),
        score=score,
        order=order,
        top_k=_top_k(topk),
        renormalize=renormalize,
        eps=eps,
        scale=scale,
        groups=groups,
        group_of=() if groups is None else tuple(expert // (experts // groups.count) for expert in range(experts)),
        hidden=hidden,
        logits=logits,
        choice=choice,
        ranked=topk.inputs[0],
        slots=Slots(ids, weights),
    )


def _top_k(topk: gs.Node) -> int:
    k = scalar(topk.inputs[1])
    if k is None:
        raise FormError("K is no constant", topk)
    return int(k)


def _strip_scale(weights: gs.Tensor) -> tuple[gs.Tensor, float]:
    node = produced_by(weights, "Mul")
    parts = None if node is None else split_constant(node)
    if parts is None:
        return weights, 1.0
    return source(parts[0]), parts[1]


def _strip_renormalisation(weights: gs.Tensor) -> tuple[gs.Tensor, bool, float]:
    node = produced_by(weights, "Div")
    if node is None:
        return weights, False, 0.0
    numerator, denominator, eps = source(node.inputs[0]), node.inputs[1], 0.0
    added = produced_by(denominator, "Add")
    parts = None if added is None else split_constant(added)
    if parts is not None:
        denominator, eps = parts
    total = produced_by(denominator, "ReduceSum")
    if total is None or source(total.inputs[0]) is not numerator:
        raise FormError("the weights are divided by something else than their sum", node)
    return numerator, True, eps


def _read_scores(base: gs.Tensor, topk: gs.Node, choice: gs.Tensor) -> tuple[str, str, gs.Tensor, gs.Constant | None]:
    """(score, order, logits, selection bias) of weights that are ``base`` before renormalisation."""
    node = producer(base)
    if node is None:
        raise FormError("the weights are not computed from logits", base)
    if node.op == "Softmax" and source(node.inputs[0]) is topk.outputs[0]:
        return "softmax", TOPK_FIRST, source(choice), None
    if node is topk:
        scores, bias = choice, None
    elif node.op == "GatherElements" and source(node.inputs[1]) is topk.outputs[1]:
        scores = source(node.inputs[0])
        bias = _selection_bias(choice, scores)
    else:
        raise FormError("the weights are neither values of the TopK nor scores gathered by its ids", node)
    function = produced_by(source(scores), *SCORES)
    if function is None:
        raise FormError("the scores are neither a softmax nor a sigmoid of logits", producer(source(scores)))
    return SCORES[function.op], SCORE_FIRST, source(function.inputs[0]), bias


def _selection_bias(choice: gs.Tensor, scores: gs.Tensor) -> gs.Constant | None:
    if source(choice) is scores:
        return None
    added = produced_by(choice, "Add")
    if added is not None:
        for this, other in ((0, 1), (1, 0)):
            if source(added.inputs[this]) is scores and isinstance(added.inputs[other], gs.Constant):
                return added.inputs[other]
    raise FormError("what is ranked is not the scores plus a constant bias", producer(choice))


def _strip_groups(ranked: gs.Tensor) -> tuple[gs.Tensor, Groups | None]:
    """What is ranked before experts of other groups were set to -inf, and the groups."""
    where = produced_by(source(ranked), "Where")
    if where is None:
        return ranked, None
    excluded = [scalar(tensor) == -np.inf for tensor in where.inputs[1:]]
    if True not in excluded:
        raise FormError("a Where before the TopK does not exclude experts with -inf", where)
    choice = where.inputs[2 if excluded[0] else 1]
    mask = source(where.inputs[0], SHAPE_ONLY | {"Not", "Expand", "Greater", "Equal"})
    scatter = produced_by(mask, "ScatterElements", "ScatterND")
    groups_topk = None if scatter is None else produced_by(source(scatter.inputs[1]), "TopK")
    if groups_topk is None:
        raise FormError("a Where before the TopK is not fed by a TopK over groups", where)
    return choice, Groups(_count_groups(groups_topk, choice), _top_k(groups_topk))


def _count_groups(groups_topk: gs.Node, choice: gs.Tensor) -> int:
    """The number of groups, where a group is scored by the sum of its two best experts."""
    total = produced_by(groups_topk.inputs[0], "ReduceSum")
    best = None if total is None else produced_by(total.inputs[0], "TopK")
    if best is None or _top_k(best) != 2:
        raise FormError("groups are not scored by the sum of their two best experts", producer(groups_topk.inputs[0]))
    reshape = produced_by(best.inputs[0], "Reshape")
    if reshape is None or source(reshape.inputs[0]) is not source(choice):
        raise FormError("groups are not runs of what is ranked", best)
    shape = operand(reshape, 1)
    if not isinstance(shape, gs.Constant) or len(shape.values) != 3:
        raise FormError("the number of groups is no constant", reshape)
    return int(shape.values[1])


def _read_linear(logits: gs.Tensor, weights: Weights) -> tuple[gs.Tensor, Weight, Weight | None, str]:
    """(hidden, weight (E, H), bias (E,), scope) of ``logits = hidden @ weight.T + bias``."""
    node, bias = producer(logits), None
    if node is not None and node.op == "Add":
        terms = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)]
        bias = next((tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)), None)
        node = producer(terms[0]) if bias is not None and len(terms) == 1 else node
    if node is None or node.op not in ("Gemm", "MatMul"):
        raise FormError("the logits are no Gemm or MatMul", node or logits)
    kernel = _through_transpose(node.inputs[1])
    flipped = kernel is not node.inputs[1]
    if not is_weight(kernel, 2) or any(node.attrs.get(key, 1.0) != 1.0 for key in ("alpha", "beta")):
        raise FormError("the router's weight is no constant matrix", node)
    weight = weights.of(kernel)
    if bool(node.attrs.get("transB", 0)) == flipped:  # stored (H, E)
        weight = weight.map(weight.shape[::-1], np.transpose).cached()
    bias = operand(node, 2) if node.op == "Gemm" and bias is None else bias
    flat = None if bias is None else weights.flat(bias, weight.shape[0])
    return source(node.inputs[0], {"Identity"}), weight, flat, block_scope(kernel.name)


def block_scope(weight_name: str) -> str:
    """The path of the MoE block, where the exporter kept the name of the router's weight, or a writer gave it one.

    >>> block_scope("model.layers.0.mlp.gate.weight"), block_scope("layers.0.mlp/router.weight"), block_scope("val_12")
    ('model.layers.0.mlp', 'layers.0.mlp', '')
    """
    scope, found, _ = weight_name.rpartition("/router.weight")
    if found:
        return scope
    parts = weight_name.split(".")
    return ".".join(parts[:-2]) if parts[-1] == "weight" else ""


def _through_transpose(tensor: gs.Tensor) -> gs.Tensor:
    node = produced_by(tensor, "Transpose")
    return tensor if node is None else node.inputs[0]
