"""One FFN, in the spellings of the field: what it computes is told from its ops, or it is refused."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from graph_passes.model_file import load_graph
from graph_passes.readers.parts.single_expert import read_ffn, require_unbiased, stack_experts
from graph_passes.record.block import Experts, FormError
from graph_passes.routers import Weights
from moe_spec.experts_op import Activation

H, F = 4, 6
RNG = np.random.default_rng(0)
WEIGHTS = {
    "up": (H, F),
    "up_turned": (F, H),
    "gate": (H, F),
    "both": (H, 2 * F),
    "down": (F, H),
    "stacked": (3, H, F),
    "bias": (F,),
    "bias_row": (1, F),
}
STORED = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in WEIGHTS.items()}
NUMBERS = {
    "half": 0.5,
    "cube": 0.044715,
    "unit": 1.0,
    "pair": 2.0,
    "third": 3.0,
    "seven": 7.0,
    "minus7": -7.0,
    "alpha": 1.75,
    "root": np.sqrt(2),
    "root_of_2_over_pi": np.sqrt(2 / np.pi),
}
INTS = {"index": 1, "start": [0], "axis": [1], "step": [2], "middle": [F], "end": [2 * F]}

TWO = "g = MatMul(x, gate) u = MatMul(x, up)"
ONE = "u = MatMul(x, up)"
SILU = "s = Sigmoid(g) a = Mul(g, s)"
DOWN = "y = MatMul(m, down)"


def experts_of(body: str, folder: Path) -> Experts:
    """The record of the FFN from ``x`` to ``y``."""
    head = f'<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]> f (float[n, {H}] x) => (float[n, {H}] y)'
    model = onnx.parser.parse_model(f"{head} {{ {body} }}")
    numbers = {name: np.asarray(value, np.float32) for name, value in NUMBERS.items()}
    for name, value in (STORED | numbers | {name: np.asarray(value) for name, value in INTS.items()}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, folder / "ffn.onnx")
    graph = load_graph(folder / "ffn.onnx")
    x, parts = read_ffn(graph.outputs[0], Weights(folder))
    assert x is graph.inputs[0]
    return stack_experts([parts])


ACTIVATIONS = {
    "gelu by erf, x last": ("d = Div(u, root) e = Erf(d) p = Add(e, unit) h = Mul(p, half) m = Mul(h, u)", "gelu", 1.0),
    "gelu by erf, x first": (
        "d = Div(u, root) e = Erf(d) p = Add(unit, e) h = Mul(u, p) m = Mul(h, half)",
        "gelu",
        1.0,
    ),
    "gelu": ("m = Gelu(u)", "gelu", 1.0),
    "gelu by tanh": (
        "c = Pow(u, third) k = Mul(c, cube) i = Add(u, k) j = Mul(i, root_of_2_over_pi) t = Tanh(j) p = Add(t, unit)"
        " h = Mul(u, half) m = Mul(h, p)",
        "gelu_tanh",
        1.0,
    ),
    "gelu by tanh, cubed by hand": (
        "q = Mul(u, u) c = Mul(q, u) k = Mul(cube, c) i = Add(u, k) j = Mul(root_of_2_over_pi, i) t = Tanh(j)"
        " p = Add(unit, t) h = Mul(p, half) m = Mul(u, h)",
        "gelu_tanh",
        1.0,
    ),
    "fast gelu": ("m = com.microsoft.FastGelu(u)", "gelu_tanh", 1.0),
    "silu": ("s = Sigmoid(u) m = Mul(s, u)", "silu", 1.0),
    "scaled silu": ("z = Mul(u, alpha) s = Sigmoid(z) m = Mul(u, s)", "silu", 1.75),
    "quick gelu": ("m = com.microsoft.QuickGelu <alpha: float = 1.75> (u)", "silu", 1.75),
    "relu": ("m = Relu(u)", "relu", 1.0),
    "squared relu by Pow": ("r = Relu(u) m = Pow(r, pair)", "relu2", 1.0),
    "squared relu by Mul": ("r = Relu(u) m = Mul(r, r)", "relu2", 1.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_told_from_its_ops(tmp_path, name):
    body, kind, alpha = ACTIVATIONS[name]
    experts = experts_of(f"{ONE} {body} {DOWN}", tmp_path)
    assert experts.activation == Activation(kind, alpha)
    assert experts.gate_EHF is None


@pytest.mark.parametrize(
    "parts",
    [
        "g, u = Split <axis = 1, num_outputs = 2> (w)",
        "g = Slice(w, start, middle, axis) u = Slice(w, middle, end, axis)",
    ],
    ids=["split", "slices"],
)
def test_gate_and_up_may_be_halves(tmp_path, parts):
    experts = experts_of(f"w = MatMul(x, both) {parts} {SILU} m = Mul(a, u) {DOWN}", tmp_path)
    assert experts.gate_EHF is not None
    np.testing.assert_array_equal(experts.gate_EHF.load()[0], STORED["both"][:, :F])
    np.testing.assert_array_equal(experts.up_EHF.load()[0], STORED["both"][:, F:])


def test_gate_and_up_may_alternate(tmp_path):
    parts = "g = Slice(w, start, end, axis, step) u = Slice(w, axis, end, axis, step)"
    experts = experts_of(f"w = MatMul(x, both) {parts} {SILU} m = Mul(u, a) {DOWN}", tmp_path)
    np.testing.assert_array_equal(experts.up_EHF.load()[0], STORED["both"][:, 1::2])


def test_gate_and_up_may_be_two_projections_in_either_order(tmp_path):
    for product in ("Mul(a, u)", "Mul(u, a)"):
        experts = experts_of(f"{TWO} {SILU} m = {product} {DOWN}", tmp_path)
        assert experts.gate_EHF is not None
        np.testing.assert_array_equal(experts.gate_EHF.load()[0], STORED["gate"])
        np.testing.assert_array_equal(experts.up_EHF.load()[0], STORED["up"])


@pytest.mark.parametrize(
    "clamps",
    ["c = Clip(g, , seven) v = Clip(u, minus7, seven)", "c = Min(g, seven) l = Min(u, seven) v = Max(l, minus7)"],
    ids=["clip", "min and max"],
)
def test_gate_and_up_may_be_clamped(tmp_path, clamps):
    body = f"{TWO} {clamps} z = Mul(c, alpha) s = Sigmoid(z) a = Mul(c, s) o = Add(v, unit) m = Mul(a, o) {DOWN}"
    assert experts_of(body, tmp_path).activation == Activation("silu", 1.75, 7.0, 1.0)


PROJECTIONS = {
    "(in, out)": ("u = MatMul(x, up)", lambda: STORED["up"], None),
    "(out, in)": ("u = Gemm <transB = 1> (x, up_turned)", lambda: STORED["up_turned"].T, None),
    "turned in the graph": (
        "t = Transpose <perm = [1, 0]> (up_turned) u = MatMul(x, t)",
        lambda: STORED["up_turned"].T,
        None,
    ),
    "one of stacked": ("t = Gather(stacked, index) u = MatMul(x, t)", lambda: STORED["stacked"][1], None),
    "one of split": (
        "p, t, q = Split <axis = 0, num_outputs = 3> (stacked) z = Squeeze(t, start) u = MatMul(x, z)",
        lambda: STORED["stacked"][1],
        None,
    ),
    "one of sliced": (
        "t = Slice(stacked, axis, step, start) z = Squeeze(t, start) u = MatMul(x, z)",
        lambda: STORED["stacked"][1],
        None,
    ),
    "biased": ("u = Gemm(x, up, bias)", lambda: STORED["up"], "bias"),
    "biased by Add": ("p = MatMul(x, up) u = Add(bias_row, p)", lambda: STORED["up"], "bias_row"),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_weight_is_found_wherever_it_is_stored(tmp_path, name):
    body, weight, bias = PROJECTIONS[name]
    experts = experts_of(f"{body} m = Relu(u) {DOWN}", tmp_path)
    np.testing.assert_array_equal(experts.up_EHF.load()[0], weight())
    assert (experts.up_bias_EF is None) == (bias is None)
    if bias is not None:
        assert experts.up_bias_EF is not None
        np.testing.assert_array_equal(experts.up_bias_EF.load()[0], STORED[bias].reshape(-1))
        with pytest.raises(FormError) as refusal:
            require_unbiased(experts, None)
        assert refusal.value.reason == "the weights multiply the input of experts that have biases"


REFUSALS = {
    "no projection": (f"{ONE} m = Relu(u) y = Relu(m)", "a projection is no Gemm or MatMul (Relu 'y')"),
    "no activation": (f"{ONE} y = MatMul(u, down)", "MatMul ends no known activation (MatMul 'u')"),
    "another function": (f"{ONE} m = Tanh(u) {DOWN}", "Tanh ends no known activation (Tanh 'm')"),
    "a gelu of another constant": (
        f"{ONE} d = Div(u, pair) e = Erf(d) p = Add(e, unit) h = Mul(p, half) m = Mul(h, u) {DOWN}",
        "Mul ends no known activation (Mul 'm')",
    ),
    "halves in the other order": (
        f"w = MatMul(x, both) u, g = Split <axis = 1, num_outputs = 2> (w) {SILU} m = Mul(a, u) {DOWN}",
        "gate and up stand in the other order (Split 'u')",
    ),
    "gate and up of other tokens": (
        f"z = Neg(x) g = MatMul(z, gate) u = MatMul(x, up) {SILU} m = Mul(a, u) {DOWN}",
        "gate and up read different values (MatMul 'g')",
    ),
    "clamped otherwise": (
        f"{TWO} c = Clip(g, minus7, seven) s = Sigmoid(c) a = Mul(c, s) m = Mul(a, u) {DOWN}",
        "gate and up are not clamped to one limit, gate from above and up on both sides (Mul 'm')",
    ),
    "scaled": (
        f"u = Gemm <alpha = 2.0> (x, up) m = Relu(u) {DOWN}",
        "a projection scales or transposes what it reads (Gemm 'u')",
    ),
    "computed weight": (
        f"w = Exp(up) u = MatMul(x, w) m = Relu(u) {DOWN}",
        "a weight is no constant (Exp 'w')",
    ),
    "two biases": (
        f"p = Gemm(x, up, bias) u = Add(p, bias_row) m = Relu(u) {DOWN}",
        "a projection adds two biases (Gemm 'p')",
    ),
    "stacked weights": (
        f"u = MatMul(x, stacked) m = Relu(u) {DOWN}",
        "a projection's weight has shape [3, 4, 6], expected a matrix (MatMul 'u')",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_known_ffn_is_refused_at_its_node(tmp_path, name):
    body, reason = REFUSALS[name]
    with pytest.raises(FormError) as refusal:
        experts_of(body, tmp_path)
    assert f"{refusal.value.reason} ({refusal.value.node})" == reason


def test_products_of_products_are_looked_through_no_deeper_than_needed(tmp_path):
    squares = " ".join(f"q{level + 1} = Mul(q{level}, q{level})" for level in range(60))
    with pytest.raises(FormError) as refusal:
        experts_of(f"q0 = MatMul(x, up) {squares} m = Mul(q60, q59) {DOWN}", tmp_path)
    assert refusal.value.reason == "Mul ends no known activation"
