"""One MoE block as a small ONNX model, and what it computes in numpy, sharing no code with graph_passes."""

import dataclasses
from math import erf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.experts_function import function_of
from moe_spec.experts_op import DOMAIN, Activation, ExpertsOp
from moe_spec.feasibility import Groups
from moe_spec.plan import LayerPlan, PruningPlan

OPSET = 20
NAME = "layers.0.mlp"
SILU = Activation("silu")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the block is like; sizes are the axes of moe_spec."""

    experts: int = 8
    top_k: int = 2
    hidden: int = 8
    width: int = 12
    score: str = "softmax"
    topk_first: bool = False
    renormalize: bool = False
    scale: float = 1.0
    router_bias: bool = False
    selection_bias: bool = False
    groups: Groups | None = None
    activation: Activation = SILU
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False
    seed: int = 0

    @property
    def op(self) -> ExpertsOp:
        return ExpertsOp(self.activation, self.gated, self.interleaved and self.gated, self.transposed, self.biased)


def weights(spec: Spec) -> dict[str, np.ndarray]:
    """Random weights in transformers' layout."""
    rng = np.random.default_rng(spec.seed)
    E, H, F = spec.experts, spec.hidden, spec.width * (2 if spec.gated else 1)

    def draw(*shape):
        return rng.normal(0, 0.5, shape).astype(np.float32)

    up, down = draw(E, F, H), draw(E, H, spec.width)
    if spec.transposed:
        up, down = (np.ascontiguousarray(array.transpose(0, 2, 1)) for array in (up, down))
    return {
        "router": draw(E, H),
        "router_bias": draw(E),
        "selection_bias": draw(E),
        "up": up,
        "down": down,
        "up_bias": draw(E, F),
        "down_bias": draw(E, H),
    }


def plan(spec: Spec, keep: tuple[int, ...], source_sha256: str) -> PruningPlan:
    layer = LayerPlan(NAME, spec.experts, min(spec.top_k, len(keep)), keep, groups=spec.groups)
    return PruningPlan(source_sha256, "by hand", (layer,))


# --- the ONNX model -------------------------------------------------------------------------------------------------


def save(spec: Spec, path: Path) -> None:
    """Write the block as a model ``x (tokens, H) -> out (tokens, H)``, experts as one node."""
    nodes, constants = _router(spec)
    names = {"up": f"{NAME}.experts.up", "down": f"{NAME}.experts.down"}
    if spec.biased:
        names |= {"up_bias": f"{NAME}.experts.up_bias", "down_bias": f"{NAME}.experts.down_bias"}
    constants |= {name: weights(spec)[key] for key, name in names.items()}
    nodes.append(
        helper.make_node(
            spec.op.op_type,
            ["x", "ids", "gates", *names.values()],
            ["out"],
            name=f"{NAME}.experts",
            domain=DOMAIN,
            **spec.op.to_attributes(),
        )
    )
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", spec.hidden])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["tokens", spec.hidden])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=[function_of(spec.op, OPSET)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _router(spec: Spec) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    tensors = weights(spec)
    constants = {f"{NAME}.gate.weight": tensors["router"], "k": np.array([spec.top_k]), "last": np.array([-1])}
    gemm = ["x", f"{NAME}.gate.weight"]
    if spec.router_bias:
        constants["router_bias"] = tensors["router_bias"]
        gemm.append("router_bias")
    nodes = [helper.make_node("Gemm", gemm, ["logits"], transB=1)]
    score = {"softmax": "Softmax", "sigmoid": "Sigmoid"}[spec.score]
    if spec.topk_first:
        nodes.append(helper.make_node("TopK", ["logits", "k"], ["best", "ids"]))
        nodes.append(helper.make_node(score, ["best"], ["selected"]))
    else:
        nodes.append(helper.make_node(score, ["logits"], ["scores"]))
        ranked = _choice(spec, nodes, constants)
        nodes.append(helper.make_node("TopK", [ranked, "k"], ["best", "ids"]))
        nodes.append(helper.make_node("GatherElements", ["scores", "ids"], ["selected"], axis=1))
    value = "selected"
    if spec.renormalize:
        nodes.append(helper.make_node("ReduceSum", [value, "last"], ["total"], keepdims=1))
        nodes.append(helper.make_node("Div", [value, "total"], ["normalized"]))
        value = "normalized"
    constants["scale"] = np.asarray(spec.scale, np.float32)
    nodes.append(helper.make_node("Mul", [value, "scale"], ["gates"]))
    return nodes, constants


def _choice(spec: Spec, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> str:
    choice = "scores"
    if spec.selection_bias:
        constants["selection_bias"] = weights(spec)["selection_bias"]
        nodes.append(helper.make_node("Add", ["scores", "selection_bias"], ["choice"]))
        choice = "choice"
    if spec.groups is None:
        return choice
    count, width = spec.groups.count, spec.experts // spec.groups.count
    constants |= {
        "group_shape": np.array([-1, count, width]),
        "two": np.array([2]),
        "selected_count": np.array([spec.groups.selected]),
        "expand": np.array([1, 1, width]),
        "flat": np.array([-1, spec.experts]),
        "minus_inf": np.asarray(-np.inf, np.float32),
        "zero": np.asarray(0, np.float32),
    }
    steps: list[tuple[str, list[str], list[str], dict[str, Any]]] = [
        ("Reshape", [choice, "group_shape"], ["grouped"], {}),
        ("TopK", ["grouped", "two"], ["pair", "pair_ids"], {}),
        ("ReduceSum", ["pair", "last"], ["group_scores"], {"keepdims": 0}),
        ("TopK", ["group_scores", "selected_count"], ["group_best", "group_ids"], {"sorted": 0}),
        ("Shape", ["group_scores"], ["group_dims"], {}),
        ("Expand", ["zero", "group_dims"], ["zeros"], {}),
        ("Shape", ["group_ids"], ["ids_dims"], {}),
        ("ConstantOfShape", ["ids_dims"], ["ones"], {"value": helper.make_tensor("one", TensorProto.FLOAT, [1], [1])}),
        ("ScatterElements", ["zeros", "group_ids", "ones"], ["group_mask"], {"axis": 1}),
        ("Unsqueeze", ["group_mask", "last"], ["mask_column"], {}),
        ("Expand", ["mask_column", "expand"], ["mask_wide"], {}),
        ("Reshape", ["mask_wide", "flat"], ["mask_flat"], {}),
        ("Cast", ["mask_flat"], ["allowed"], {"to": TensorProto.BOOL}),
        ("Not", ["allowed"], ["excluded"], {}),
        ("Where", ["excluded", "minus_inf", choice], ["ranked"], {}),
    ]
    nodes += [helper.make_node(op, inputs, outputs, **attributes) for op, inputs, outputs, attributes in steps]
    return "ranked"


# --- the same in numpy ----------------------------------------------------------------------------------------------


def compute(spec: Spec, x_TH: np.ndarray, keep: tuple[int, ...]) -> np.ndarray:
    """(T, H): the block when only ``keep`` can be selected, in float64, token by token."""
    tensors = {name: array.astype(np.float64) for name, array in weights(spec).items()}
    return np.stack([_token(spec, tensors, token.astype(np.float64), keep) for token in x_TH])


def _token(spec: Spec, tensors: dict[str, np.ndarray], x: np.ndarray, keep: tuple[int, ...]) -> np.ndarray:
    logits = tensors["router"] @ x + (tensors["router_bias"] if spec.router_bias else 0.0)
    logits = np.where(np.isin(np.arange(spec.experts), keep), logits, -np.inf)
    top_k = min(spec.top_k, len(keep))
    scores = _score(spec, logits)
    chosen = sorted(_selectable(spec, scores, logits, tensors, keep), key=lambda pair: -pair[1])[:top_k]
    ids = [expert for expert, _ in chosen]
    gates = _score(spec, logits[ids]) if spec.topk_first else scores[ids]
    gates = gates / gates.sum() if spec.renormalize else gates
    return sum(spec.scale * gate * _expert(spec, tensors, x, expert) for gate, expert in zip(gates, ids, strict=True))


def _score(spec: Spec, logits: np.ndarray) -> np.ndarray:
    if spec.score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _selectable(spec: Spec, scores, logits, tensors, keep) -> list[tuple[int, float]]:
    """(expert, rank) of every expert that may be chosen."""
    if spec.topk_first:
        return [(expert, logits[expert]) for expert in keep]
    choice = scores + (tensors["selection_bias"] if spec.selection_bias else 0.0)
    allowed = set(range(spec.experts))
    if spec.groups is not None:
        width = spec.experts // spec.groups.count

        def value(group: int) -> tuple[int, float]:
            members = sorted((choice[e] for e in keep if e // width == group), reverse=True)[:2]
            return len(members), float(sum(members))

        best = sorted(range(spec.groups.count), key=value, reverse=True)[: spec.groups.selected]
        allowed = {expert for expert in range(spec.experts) if expert // width in best}
    return [(expert, choice[expert]) for expert in keep if expert in allowed]


def _expert(spec: Spec, tensors: dict[str, np.ndarray], x: np.ndarray, expert: int) -> np.ndarray:
    up, down = tensors["up"][expert], tensors["down"][expert]
    if spec.transposed:
        up, down = up.T, down.T
    projected = up @ x + (tensors["up_bias"][expert] if spec.biased else 0.0)
    activation, limit = spec.activation, spec.activation.limit or np.inf
    if spec.gated:
        gate, value = (projected[0::2], projected[1::2]) if spec.op.interleaved else np.split(projected, 2)
        value = np.clip(value, -limit, limit) + activation.up_offset
        middle = _act(activation, np.minimum(gate, limit)) * value
    else:
        middle = _act(activation, projected)
    return down @ middle + (tensors["down_bias"][expert] if spec.biased else 0.0)


def _act(activation: Activation, x):
    match activation.kind:
        case "silu":
            return x / (1 + np.exp(-activation.alpha * x))
        case "gelu":
            return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        case "relu":
            return np.maximum(x, 0)
        case _:
            return np.maximum(x, 0) ** 2
