"""Axes are followed through whatever moves values, and refused where they end up elsewhere."""

from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import pytest

from graph_passes.model_file import load_graph
from graph_passes.readers.axes.axis_reader import AxisReader
from graph_passes.readers.axes.names import EXPERTS, HIDDEN, SLOTS, TOKENS, WIDTH, text
from graph_passes.record.block import FormError

INPUTS = "float[t, 4] x, float[t, 3] g, float[3, 4, 6] w, int64[t, 2] ids"
SIZES = {EXPERTS: 3, HIDDEN: 4, WIDTH: 6, SLOTS: 2}
CONSTANTS = """
    i0 = Constant<value_ints = [0]>()
    i1 = Constant<value_ints = [1]>()
    last = Constant<value_ints = [-1]>()
    s311 = Constant<value_ints = [3, 1, 1]>()
    s31 = Constant<value_ints = [3, 1]>()
    s51 = Constant<value_ints = [5, 1]>()
    by_expert = Constant<value_ints = [3, -1, 4]>()
    flat = Constant<value_ints = [-1, 18]>()
    apart = Constant<value_ints = [-1, 3, 6]>()
    wrong = Constant<value_ints = [-1, 6, 3]>()
    kept = Constant<value_ints = [0, -1]>()
"""


def graph_of(body: str, folder: Path) -> gs.Graph:
    text = f'<ir_version: 10, opset_import: ["" : 20]> m ({INPUTS}) => (float[n] y) {{ {CONSTANTS} {body} }}'
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    return load_graph(folder / "model.onnx")


def axes_of_y(body: str, folder: Path, summed=EXPERTS) -> str:
    graph = graph_of(body, folder)
    x, g, w, ids = graph.inputs
    axes = AxisReader(summed)
    for axis, length in SIZES.items():
        axes.size(axis, length)
    axes.know(x, TOKENS, HIDDEN)
    axes.know(g, TOKENS, EXPERTS)
    axes.know(w, EXPERTS, HIDDEN, WIDTH)
    axes.know(ids, TOKENS, SLOTS)
    return text(axes.of(graph.outputs[0]))


FOLLOWED = {
    "y = MatMul(x, w)": "(E, T, F)",
    'y = Einsum<equation = "th,ehf->tef">(x, w)': "(T, E, F)",
    'y = Einsum<equation = "th,te->te">(x, g)': None,
    "a = Unsqueeze(x, i0) b = Expand(a, s311) y = MatMul(b, w)": "(E, T, F)",
    "a = Tile(x, s31) y = Reshape(a, by_expert)": "(E, T, H)",
    "a = Tile(x, s51) y = Reshape(a, by_expert)": None,
    'a = Einsum<equation = "th,ehf->tef">(x, w) y = Reshape(a, flat)': "(T, E*F)",
    'a = Einsum<equation = "th,ehf->tef">(x, w) b = Reshape(a, flat) y = Reshape(b, apart)': "(T, E, F)",
    'a = Einsum<equation = "th,ehf->tef">(x, w) b = Reshape(a, flat) y = Reshape(b, wrong)': None,
    'a = Einsum<equation = "th,ehf->tef">(x, w) y = Reshape(a, kept)': "(T, E*F)",
    "a = Transpose<perm = [1, 0]>(g) b = Unsqueeze(a, last) c = MatMul(x, w) y = Mul(c, b)": "(E, T, F)",
    "b = Unsqueeze(g, last) c = MatMul(x, w) y = Mul(c, b)": None,
    "a = MatMul(x, w) y = ReduceSum<keepdims = 0>(a, i0)": "(T, F)",
    "a = MatMul(x, w) y = ReduceSum<keepdims = 0>(a, i1)": None,
    "a = MatMul(x, w) s = Shape(a) l = Gather(s, i0) h = Gather(s, last) "
    "n = Concat<axis = 0>(last, h) y = Reshape(a, n)": "(E*T, F)",
    "a = Unsqueeze(x, i1) y = Squeeze(a, i1)": "(T, H)",
    "y = Squeeze(x, i1)": None,
    "y = Softmax(x)": None,
    "a = Unsqueeze(x, last) y = Transpose<perm = [0, 1, 7]>(a)": None,
}


@pytest.mark.parametrize("body", [body for body, axes in FOLLOWED.items() if axes is not None])
def test_axes_are_followed(tmp_path, body):
    assert axes_of_y(body, tmp_path) == FOLLOWED[body]


@pytest.mark.parametrize("body", [body for body, axes in FOLLOWED.items() if axes is None])
def test_axes_in_wrong_places_are_refused(tmp_path, body):
    with pytest.raises(FormError):
        axes_of_y(body, tmp_path)


def test_gathered_weights_stand_for_the_slots_of_a_token(tmp_path):
    body = "k = Gather<axis = 0>(w, ids) a = Unsqueeze(x, i1) b = Unsqueeze(a, i1) y = MatMul(b, k)"
    assert axes_of_y(body, tmp_path, SLOTS) == "(T, K, 1, F)"


def test_experts_of_a_token_are_picked_by_its_ids(tmp_path):
    body = """
        a = Einsum<equation = "th,ehf->tef">(x, w)
        b = Unsqueeze(ids, last)
        six = Constant<value_ints = [1, 1, 6]>()
        c = Expand(b, six)
        y = GatherElements<axis = 1>(a, c)
    """
    assert axes_of_y(body, tmp_path, SLOTS) == "(T, K, F)"
