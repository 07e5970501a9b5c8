"""How far the input of a router reaches: normalisations in the forms that exporters write, and near-misses."""

import numpy as np
import pytest

from graph_passes.model_file import load_graph
from graph_passes.unreachable.norms import read_norm
from tests.graph_passes.text_files import written
from tests.zoo import RUNNER

WIDTH = 4
SCALE = np.asarray([1.0, -2.0, 0.5, 3.0], np.float32)
BIAS = np.asarray([0.5, 0.0, -1.0, 2.0], np.float32)

HEAD = """<ir_version: 12, opset_import: ["" : 23, "com.microsoft" : 1]>
g (float[tokens, 4] x) => (float[tokens, 4] y) {{
    two = Constant<value_float = 2.0>()
    one = Constant<value_float = 1.0>()
    tiny = Constant<value_float = 0.000001>()
    last = Constant<value_ints = [-1]>()
    rows = Constant<value_ints = [-1, 4]>()
    {body}
    y = Identity(hidden)
}}"""

ROOT = "square = {square}  mean = ReduceMean(square, last)  moved = Add(mean, tiny)  root = Sqrt(moved)"

NORMS = {
    "LayerNormalization": "hidden = LayerNormalization(x, scale, bias)",
    "RMSNormalization": "hidden = RMSNormalization(x, scale)",
    "skip": "hidden = com.microsoft.SkipSimplifiedLayerNormalization(x, x, scale)",
    "powers and reciprocal": ROOT.format(square="Pow(x, two)")
    + " inverse = Reciprocal(root)  unit = Mul(x, inverse)  hidden = Mul(scale, unit)",
    "products and division": ROOT.format(square="Mul(x, x)") + " unit = Div(x, root)  hidden = Mul(unit, scale)",
    "reshaped": "normed = LayerNormalization(x, scale, bias)  hidden = Reshape(normed, rows)",
}

NONE = {
    "the value itself": "hidden = Identity(x)",
    "a power of three": "three = Constant<value_float = 3.0>() "
    + ROOT.format(square="Pow(x, three)")
    + " unit = Div(x, root)  hidden = Mul(unit, scale)",
    "the root of another value": "other = Mul(x, two) "
    + ROOT.format(square="Mul(other, other)")
    + " unit = Div(x, root)  hidden = Mul(unit, scale)",
    "a product with another value": "other = Mul(x, two)  square = Mul(x, other)  mean = ReduceMean(square, last)"
    " moved = Add(mean, tiny)  root = Sqrt(moved)  unit = Div(x, root)  hidden = Mul(unit, scale)",
    "another axis": "first = Constant<value_ints = [0]>() square = Mul(x, x)  mean = ReduceMean(square, first)"
    " moved = Add(mean, tiny)  root = Sqrt(moved)  unit = Div(x, root)  hidden = Mul(unit, scale)",
    "a computed scale": "computed = Mul(scale, two)  normed = RMSNormalization(x, scale)  hidden = Mul(normed, x)",
}


def norm_of(body: str, tmp_path):
    path = written(HEAD.format(body=body), tmp_path / "model.onnx", scale=SCALE, bias=BIAS)
    graph = load_graph(path)
    return read_norm(graph.outputs[0].inputs[0].inputs[0], WIDTH, tmp_path), path


@pytest.mark.parametrize("name", NORMS)
def test_a_normalisation_is_read_with_its_scale(tmp_path, name):
    norm, path = norm_of(NORMS[name], tmp_path)
    assert norm is not None
    np.testing.assert_array_equal(norm.scale, SCALE)
    np.testing.assert_array_equal(norm.bias, BIAS if "bias" in NORMS[name] else np.zeros(WIDTH))
    x = (np.random.default_rng(0).standard_normal((200, WIDTH)) * 1e3).astype(np.float32)
    hidden = RUNNER.run(path, [{"x": x}])[0]["y"]
    unit = (hidden - norm.bias) / norm.scale
    assert np.linalg.norm(unit, axis=1).max() <= np.sqrt(WIDTH) * 1.0001


@pytest.mark.parametrize("name", NONE)
def test_what_only_looks_like_one_bounds_nothing(tmp_path, name):
    assert norm_of(NONE[name], tmp_path)[0] is None
