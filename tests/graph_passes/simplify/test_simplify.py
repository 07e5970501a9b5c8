"""Passes before reading: functions, constant conditions, the constants of bodies."""

import dataclasses

import numpy as np
import onnx
import onnx.parser
import pytest

from graph_passes.graph.walk import every_node
from graph_passes.model_file import load_graph, load_model, save_graph
from graph_passes.optimize import optimize
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL
from tests.graph_passes.block_models import NAME, Spec, compute, plan, save
from tests.graph_passes.text_files import written
from tests.zoo import RUNNER

X = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


def ops(graph) -> list[str]:
    return sorted(node.op for node in every_node(graph))


def round_trip(path):
    """What the file computes, and what it computes once it was read and written again."""
    target = path.parent / "again.onnx"
    save_graph(load_graph(path), path.parent, target)
    return tuple(RUNNER.run(file, [{"x": X}])[0]["y"] for file in (path, target))


# --- functions ------------------------------------------------------------------------------------------------------

FUNCTIONS = """
<ir_version: 10, opset_import: ["" : 20, "lib" : 1]>
g (float[N, 4] x) => (float[N, 4] y) {{ a = lib.normal(x)  y = lib.outer(a) }}
<domain: "lib", opset_import: ["" : {opset}]>
normal (x) => (y) {{ last = Constant<value_ints = [-1]>()  total = ReduceSum(x, last)  y = {op} }}
<domain: "lib", opset_import: ["" : {opset}, "lib" : 1]>
outer (x) => (y) {{ inner = lib.{called}(x)  y = Relu(inner) }}
"""


def functions(path, opset=20, op="Div(x, total)", called="normal"):
    return written(FUNCTIONS.format(opset=opset, op=op, called=called), path)


def test_functions_are_inlined_wherever_they_are_called(tmp_path):
    loaded = load_model(functions(tmp_path / "model.onnx"))
    assert ops(loaded.graph) == ["Div", "Div", "ReduceSum", "ReduceSum", "Relu"]
    assert [(entry.name, entry.modified, entry.nodes_before, entry.nodes_after) for entry in loaded.passes] == [
        ("inline-functions", True, 2, 5),
        ("fold-conditions", False, 5, 5),
    ]
    expected, got = round_trip(tmp_path / "model.onnx")
    np.testing.assert_array_equal(got, expected)
    again = onnx.load(tmp_path / "again.onnx")
    assert ([entry.domain for entry in again.opset_import], list(again.functions)) == ([""], [])


def test_a_function_of_another_opset_is_inlined_where_its_ops_are_the_same(tmp_path):
    expected, got = round_trip(functions(tmp_path / "model.onnx", opset=18))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"opset": 17, "op": "ReduceMax<axes = [0]>(x)"},
            "function lib.normal is written for opset 17, the model for opset 20, and ReduceMax changed in between",
        ),
        ({"called": "outer"}, "function lib.outer calls itself"),
    ],
)
def test_a_function_that_cannot_be_inlined_is_refused(tmp_path, changes, what):
    path = functions(tmp_path / "model.onnx", **changes)
    with pytest.raises(UserError) as error:
        load_graph(path)
    assert error.value.what == f"{path}: {what}"


def test_functions_that_multiply_are_refused_before_they_do(tmp_path):
    """Thirty levels that double: a billion nodes in a file of 4 KB."""
    calls = "".join(
        f'<domain: "lib", opset_import: ["" : 20, "lib" : 1]>\nf{level} (x) => (y) '
        f"{{ a = {'Relu' if level == 0 else f'lib.f{level - 1}'}(x)  "
        f"y = {'Relu' if level == 0 else f'lib.f{level - 1}'}(a) }}\n"
        for level in range(30)
    )
    head = (
        '<ir_version: 10, opset_import: ["" : 20, "lib" : 1]>\ng (float[N, 4] x) => (float[N, 4] y) { y = lib.f29(x) }'
    )
    path = written(f"{head}\n{calls}", tmp_path / "model.onnx")
    with pytest.raises(UserError) as error:
        load_graph(path)
    assert error.value.what == f"{path} has {2**30:,} nodes once its functions are inlined, at most 1,000,000"


def test_a_layer_in_a_function_is_pruned_and_its_weights_are_not_read(tmp_path):
    spec, keep = Spec(in_function=True), (0, 2, 5)
    path = tmp_path / MODEL
    save(spec, path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0)
    manifest = optimize(
        path, tmp_path / "out", RUNNER, plan=plan(spec, keep, onnx_sha256(path, ["weights"])), form="dense"
    )
    assert [(entry.name, entry.modified) for entry in manifest.passes][:2] == [
        ("inline-functions", True),
        ("fold-conditions", False),
    ]
    x = np.random.default_rng(0).standard_normal((6, spec.hidden)).astype(np.float32)
    got = RUNNER.run(tmp_path / "out" / MODEL, [{"x": x}])[0]["out"]
    np.testing.assert_allclose(got, compute(spec, x, keep), atol=1e-5)
    assert not onnx.load(tmp_path / "out" / MODEL, load_external_data=False).functions


def test_a_model_of_functions_in_which_nothing_goes_is_copied(tmp_path):
    save(Spec(in_function=True), tmp_path / "block.onnx")
    manifest = optimize(tmp_path / "block.onnx", tmp_path / "out", RUNNER)
    assert (tmp_path / "out" / MODEL).read_bytes() == (tmp_path / "block.onnx").read_bytes()
    assert not any(entry.modified for entry in manifest.passes)


# --- conditions -----------------------------------------------------------------------------------------------------

CONDITIONS = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 4] x, bool maybe) => (float[N, 4] y)
<bool yes = {{1}}, float two = {{2}}> {{
    h = Relu(x)
    other = Neg(x)
    not_yes = Not(yes)
    y = If({outer}) <
        then_branch = t () => (float[N, 4] q) {{ s = MatMul(h, w)  q = If(not_yes) <
            then_branch = tt () => (float[N, 4] r) {{ r = Exp(s) }},
            else_branch = te () => (float[N, 4] r) {{ r = Mul(s, two) }}> }},
        else_branch = e () => (float[N, 4] q) {{ s = MatMul(other, w)  q = Neg(s) }}>
}}
"""
W = np.eye(4, dtype=np.float32) * 3


@pytest.mark.parametrize(
    ("condition", "left"),
    [("yes", ["MatMul", "Mul", "Relu"]), ("not_yes", ["MatMul", "Neg", "Neg"])],
)
def test_a_constant_condition_gives_its_branch(tmp_path, condition, left):
    path = written(CONDITIONS.format(outer=condition), tmp_path / "model.onnx", w=W)
    loaded = load_model(path)
    assert ops(loaded.graph) == left
    assert loaded.passes[1].modified
    target = tmp_path / "again.onnx"
    save_graph(loaded.graph, tmp_path, target)
    feeds = [{"x": X, "maybe": np.asarray(True)}]
    np.testing.assert_array_equal(RUNNER.run(target, feeds)[0]["y"], RUNNER.run(path, feeds)[0]["y"])


def test_a_condition_that_an_input_changes_stays_and_what_is_constant_inside_goes(tmp_path):
    path = written(CONDITIONS.format(outer="maybe"), tmp_path / "model.onnx", w=W)
    loaded = load_model(path)
    assert ops(loaded.graph) == ["If", "MatMul", "MatMul", "Mul", "Neg", "Neg", "Relu"]
    target = tmp_path / "again.onnx"
    save_graph(loaded.graph, tmp_path, target)
    for maybe in (True, False):
        feeds = [{"x": X, "maybe": np.asarray(maybe)}]
        np.testing.assert_array_equal(RUNNER.run(target, feeds)[0]["y"], RUNNER.run(path, feeds)[0]["y"])


def test_constants_that_bodies_read_stand_in_the_graph_once(tmp_path):
    path = written(CONDITIONS.format(outer="maybe"), tmp_path / "model.onnx", w=W)
    save_graph(load_graph(path), tmp_path, tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    assert sorted(tensor.name for tensor in again.graph.initializer) == ["two", "w"]
    branches = [attribute.g for node in again.graph.node for attribute in node.attribute if attribute.HasField("g")]
    assert [list(branch.initializer) for branch in branches] == [[], []]


LOCAL = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 4] x, bool maybe) => (float[N, 4] y) {
    y = If(maybe) <
        then_branch = t () => (float[N, 4] q) <float c = {2}> { d = Constant<value_float = 3.0>()  p = Mul(x, c)
            q = Mul(p, d) },
        else_branch = e () => (float[N, 4] q) <float c = {5}> { d = Constant<value_float = 7.0>()  p = Mul(x, c)
            q = Mul(p, d) }>
}
"""


def test_constants_of_two_bodies_may_share_a_name(tmp_path):
    path = written(LOCAL, tmp_path / "model.onnx")
    save_graph(load_graph(path), tmp_path, tmp_path / "again.onnx")
    for maybe in (True, False):
        feeds = [{"x": X, "maybe": np.asarray(maybe)}]
        got = RUNNER.run(tmp_path / "again.onnx", feeds)[0]["y"]
        np.testing.assert_array_equal(got, RUNNER.run(path, feeds)[0]["y"])


def test_a_layer_whose_condition_is_constant_is_read_and_the_file_is_written_anew(tmp_path):
    """The whole block stands in the branch that is always taken."""
    spec = Spec()
    save(spec, tmp_path / "plain.onnx")
    model = onnx.load(tmp_path / "plain.onnx")
    body = onnx.helper.make_graph(list(model.graph.node), "layer", [], list(model.graph.output))
    empty = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["out"])], "none", [], body.output)
    node = onnx.helper.make_node("If", ["always"], ["out"], then_branch=body, else_branch=empty)
    del model.graph.node[:]
    model.graph.node.append(node)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(True), "always"))
    onnx.save(model, tmp_path / "block.onnx")
    manifest = optimize(tmp_path / "block.onnx", tmp_path / "out", RUNNER)
    assert [(entry.name, entry.modified) for entry in manifest.passes if entry.modified] == [("fold-conditions", True)]
    assert [(block.name, block.experts) for block in manifest.blocks] == [(NAME, 8)]
    x = np.random.default_rng(0).standard_normal((6, spec.hidden)).astype(np.float32)
    got = RUNNER.run(tmp_path / "out" / MODEL, [{"x": x}])[0]["out"]
    np.testing.assert_allclose(got, compute(dataclasses.replace(spec), x, tuple(range(8))), atol=1e-5)
