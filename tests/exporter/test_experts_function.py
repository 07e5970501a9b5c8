"""The experts node's definition in standard ops, run by ONNX Runtime, against a loop over tokens and slots in numpy."""

import itertools
import math
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.experts_function import function_of
from exporter.write import OPSET
from moe_spec.experts_op import ACTIVATIONS, DOMAIN, NO_LIMIT, VERSION, Activation, ExpertsOp
from tests.zoo import RUNNER

TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 7, 4, 2, 6, 3

LAYOUTS = {
    "plain": {"gated": False, "interleaved": False},
    "gated": {"gated": True, "interleaved": False},
    "interleaved": {"gated": True, "interleaved": True},
}
SETTINGS = (
    Activation("silu", alpha=1.702, limit=0.5, up_offset=1.0),
    Activation("silu", alpha=2.0),
    Activation("relu", limit=0.25),
    Activation("gelu", up_offset=-0.5),
)

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
every_side = pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
every_bias = pytest.mark.parametrize("biased", [False, True], ids=["bare", "biased"])

ACTS = {
    "silu": lambda x, alpha: x / (1 + np.exp(-alpha * x)),
    "gelu": lambda x, _: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x, _: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x, _: np.maximum(x, 0),
    "relu2": lambda x, _: np.maximum(x, 0) ** 2,
}


def feeds_of(op):
    """Random inputs of the node, in its order; each token goes to K distinct experts, and expert 2 gets none."""
    rng = np.random.default_rng(0)
    columns = 2 * WIDTH if op.gated else WIDTH
    shapes: dict[str, tuple[int, ...]] = {"up": (EXPERTS, HIDDEN, columns), "down": (EXPERTS, WIDTH, HIDDEN)}
    if op.biased:
        shapes |= {"up_bias": (EXPERTS, columns), "down_bias": (EXPERTS, HIDDEN)}
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    if not op.transposed:
        arrays |= {name: np.ascontiguousarray(arrays[name].transpose(0, 2, 1)) for name in ("up", "down")}
    ids = np.stack([rng.permutation([0, 1, 3])[:TOP_K] for _ in range(TOKENS)])
    hidden = rng.standard_normal((TOKENS, HIDDEN), dtype=np.float32)
    return {"hidden": hidden, "ids": ids, "weights": rng.random((TOKENS, TOP_K), dtype=np.float32)} | arrays


def run_node(op, feeds, tmp_path):
    """What ONNX Runtime makes of one node and its function."""
    kinds = {name: TensorProto.INT64 if name == "ids" else TensorProto.FLOAT for name in feeds}
    graph = helper.make_graph(
        [helper.make_node(op.op_type, list(feeds), ["out"], domain=DOMAIN, **op.to_attributes())],
        "node",
        [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, feeds["hidden"].shape)],
    )
    model = helper.make_model(
        graph,
        functions=[function_of(op, OPSET)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "node.onnx")
    return RUNNER.run(tmp_path / "node.onnx", [feeds])[0]["out"]


def expected(op, feeds, top_k=TOP_K):
    """``out_t = sum_k w_tk f_{ids_tk}(hidden_t)`` in float64, one token and one slot at a time."""
    arrays = {name: array if name == "ids" else array.astype(np.float64) for name, array in feeds.items()}
    up, down = (arrays[name] if op.transposed else arrays[name].transpose(0, 2, 1) for name in ("up", "down"))
    out = np.zeros((TOKENS, HIDDEN))
    for token, slot in itertools.product(range(TOKENS), range(top_k)):
        expert = arrays["ids"][token, slot]
        projected = arrays["hidden"][token] @ up[expert] + (arrays["up_bias"][expert] if op.biased else 0)
        result = between(op, projected) @ down[expert] + (arrays["down_bias"][expert] if op.biased else 0)
        out[token] += arrays["weights"][token, slot] * result
    return out


def between(op, projected):
    """What an expert does between its two projections."""
    kind, alpha, limit, offset = vars(op.activation).values()
    limit = np.inf if limit == NO_LIMIT else limit
    if not op.gated:
        return ACTS[kind](np.clip(projected, -limit, limit), alpha)
    gate, up = (projected[0::2], projected[1::2]) if op.interleaved else np.split(projected, 2)
    return ACTS[kind](np.minimum(gate, limit), alpha) * (np.clip(up, -limit, limit) + offset)


@every_bias
@every_side
@every_layout
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_function_computes_the_experts(kind, layout, transposed, biased, tmp_path):
    op = ExpertsOp(Activation(kind), **layout, transposed=transposed, biased=biased)
    feeds = feeds_of(op)
    np.testing.assert_allclose(run_node(op, feeds, tmp_path), expected(op, feeds), rtol=1e-5, atol=1e-5)


@every_layout
@pytest.mark.parametrize("activation", SETTINGS, ids=str)
def test_the_function_scales_clamps_and_shifts(activation, layout, tmp_path):
    op = ExpertsOp(activation, **layout, transposed=True, biased=True)
    feeds = feeds_of(op)
    np.testing.assert_allclose(run_node(op, feeds, tmp_path), expected(op, feeds), rtol=1e-5, atol=1e-5)


@every_layout
def test_gates_on_the_input_are_what_the_experts_read(layout, tmp_path):
    op = ExpertsOp(Activation("silu"), **layout, transposed=True, biased=False, gates_input=True)
    feeds = feeds_of(op)
    out = np.zeros((TOKENS, HIDDEN))
    for slot in range(TOP_K):
        ones = np.ones((TOKENS, 1), np.float32)
        scaled = {"hidden": feeds["hidden"] * feeds["weights"][:, [slot]], "ids": feeds["ids"][:, [slot]]}
        out += expected(op, feeds | scaled | {"weights": ones}, top_k=1)
    np.testing.assert_allclose(run_node(op, feeds, tmp_path), out, rtol=1e-5, atol=1e-5)


def test_an_expert_chosen_by_nobody_changes_nothing(tmp_path):
    op = ExpertsOp(Activation("silu"), gated=True, interleaved=False, transposed=True, biased=True)
    feeds = feeds_of(op)
    without = {
        name: array if array.shape[0] == TOKENS else np.delete(array, 2, axis=0) for name, array in feeds.items()
    }
    without["ids"] = np.where(feeds["ids"] > 2, feeds["ids"] - 1, feeds["ids"])
    np.testing.assert_array_equal(run_node(op, without, tmp_path), run_node(op, feeds, tmp_path))


def test_every_variant_has_a_name_of_its_own():
    numbers = itertools.product((1.0, 7.0, 1.702), (NO_LIMIT, 1.0, 7.0), (0.0, 1.0, -1.0, 1e-05))
    activations = [Activation(kind, *values) for kind in ACTIVATIONS for values in numbers]
    flags = list(itertools.product((False, True), repeat=5))
    names = [ExpertsOp(activation, *five).op_type for activation in activations for five in flags]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"Experts_\w+", name) for name in names)
    assert all(function_of(ExpertsOp(one, True, False, False, False), OPSET).name in names for one in activations)
