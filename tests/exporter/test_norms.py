import onnx.parser
import onnxruntime
import pytest

from exporter.norms import divide_by_roots
from models.checkpoints import load_model
from moe_spec.manifest import MODEL

HEAD = "g (float[N, 4] x, float[N, 1] v) => (float[N, 4] y"


def rewritten(body, outputs=""):
    graph = onnx.parser.parse_graph(f"{HEAD}{outputs}) {{ {body} }}")
    divide_by_roots(graph)
    return [f"{', '.join(node.output)} = {node.op_type}({', '.join(node.input)})" for node in graph.node]


@pytest.mark.parametrize("factors", ["x, inverse", "inverse, x"])
def test_what_is_scaled_by_an_inverse_root_is_divided_by_the_root(factors):
    assert rewritten(f"root = Sqrt(v) inverse = Reciprocal(root) y = Mul({factors})") == [
        "root = Sqrt(v)",
        "y = Div(x, root)",
    ]


def test_a_root_that_others_read_stays():
    body = "root = Sqrt(v) inverse = Reciprocal(root) scaled = Mul(x, inverse) y = Add(scaled, root)"
    assert rewritten(body) == ["root = Sqrt(v)", "scaled = Div(x, root)", "y = Add(scaled, root)"]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("root = Sqrt(v) inverse = Reciprocal(root) a = Mul(x, inverse) y = Mul(a, inverse)", ""),
        ("root = Sqrt(v) inverse = Reciprocal(root) y = Mul(x, inverse)", ", float[N, 1] inverse"),
        ("root = Sqrt(v) inverse = Reciprocal(root) twice = Mul(inverse, inverse) y = Mul(x, twice)", ""),
        ("inverse = Reciprocal(v) y = Mul(x, inverse)", ""),
        ("root = Exp(v) inverse = Reciprocal(root) y = Mul(x, inverse)", ""),
        ("root = Sqrt(v) inverse = Reciprocal(root) y = Add(x, inverse)", ""),
    ],
    ids=["read twice", "an output", "squared", "no root", "another root", "added"],
)
def test_what_is_no_norm_stays_as_it_is(body, outputs):
    assert len(rewritten(body, outputs)) == body.count("=")
    assert not any("Div" in line for line in rewritten(body, outputs))


def test_a_reciprocal_that_a_body_reads_stays():
    bodies = "<then_branch = t () => (float[N, 4] t) { t = Mul(a, inverse) }, else_branch = e () => (e) { e = Exp(a) }>"
    norm = "root = Sqrt(v) inverse = Reciprocal(root) a = Mul(x, inverse)"
    assert rewritten(f"{norm} yes = Constant<value = bool {{1}}>() y = If(yes) {bodies}")[:3] == [
        "root = Sqrt(v)",
        "inverse = Reciprocal(root)",
        "a = Mul(x, inverse)",
    ]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_onnx_runtime_makes_one_node_of_every_norm(name, zoo, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(zoo.exported(name) / MODEL, options)
    optimised = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    ops = [node.op_type for node in optimised.graph.node]
    norms = [module for module in load_model(zoo.checkpoint(name)).modules() if "RMSNorm" in type(module).__name__]
    assert ops.count("SimplifiedLayerNormalization") + ops.count("SkipSimplifiedLayerNormalization") == len(norms) > 0
    assert "Reciprocal" not in ops
