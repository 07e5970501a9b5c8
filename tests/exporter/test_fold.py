"""What a graph makes of weights alone goes out of it, to be made of their values."""

import numpy as np
import onnx.parser
import pytest

from exporter.fold import empty_tensor, evaluate, fold

W = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)


def model_of(nodes, values, inputs="float[2, 3] w"):
    """A model of ``x``, and the parameters that it reads, which are inputs while torch.onnx optimises."""
    signature = f"g (float[N, 3] x, {inputs}) => (float[N, M] y) <{values}>"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {signature} {{ {nodes} }}')
    parameters = {value.name: empty_tensor(value.name, value) for value in model.graph.input[1:]}
    del model.graph.input[1:]
    return model, parameters


def left(model):
    return [node.op_type for node in model.graph.node], {
        tensor.name: list(tensor.dims) for tensor in model.graph.initializer
    }


def test_a_transposed_weight_is_an_initialiser_of_its_own():
    model, parameters = model_of("t = Transpose(w) y = MatMul(x, t)", "float[3, 2] t")
    folded = fold(model, parameters)
    assert left(model) == (["MatMul"], {"w.transpose": [3, 2]})
    assert list(model.graph.node[0].input) == ["x", "w.transpose"]
    np.testing.assert_array_equal(evaluate(folded["w.transpose"], {"w": W}), W.T)


def test_a_chain_is_one_recipe_with_the_constants_it_reads():
    nodes = "c = Add(w, one) e = Exp(c) t = Transpose(e) y = MatMul(x, t)"
    model, parameters = model_of(nodes, "float one = {1}, float[2, 3] c, float[2, 3] e, float[3, 2] t")
    folded = fold(model, parameters)
    name = "w.add.exp.transpose"
    assert (left(model)[0], list(folded)) == (["MatMul"], [name])
    np.testing.assert_allclose(evaluate(folded[name], {"w": W}), np.exp(W + 1).T, rtol=1e-6)


def test_several_outputs_are_made_once_each():
    nodes = "a, b = Split<axis=0, num_outputs=2>(w) p = Mul(x, a) y = Add(p, b)"
    model, parameters = model_of(nodes, "float[1, 3] a, float[1, 3] b")
    folded = fold(model, parameters)
    assert left(model) == (["Mul", "Add"], {"w.split": [1, 3], "b": [1, 3]})
    np.testing.assert_array_equal(evaluate(folded["b"], {"w": W}), W[1:])


def test_what_is_made_of_two_weights_keeps_its_name():
    model, parameters = model_of("t = Add(w, v) y = MatMul(x, t)", "float[3, 3] t", "float[3, 3] w, float[3, 3] v")
    folded = fold(model, parameters)
    assert left(model) == (["MatMul"], {"t": [3, 3]})
    np.testing.assert_array_equal(evaluate(folded["t"], {"w": np.eye(3), "v": np.eye(3)}), 2 * np.eye(3))


BRANCHES = """
   t = Transpose(w)
   some = ReduceMax<keepdims=0>(x)
   c = Greater(some, zero)
   y = If(c)<then_branch = yes () => (float[N, M] a) { a = MatMul(x, t) },
             else_branch = no () => (float[N, M] b) { b = Neg(x) }>
"""


def test_what_only_a_body_reads_is_read():
    model, parameters = model_of(BRANCHES, "float zero = {0}, float[3, 2] t")
    folded = fold(model, parameters)
    assert left(model) == (["ReduceMax", "Greater", "If"], {"zero": [], "w.transpose": [3, 2]})
    (then, _) = (attribute.g for attribute in model.graph.node[2].attribute)
    assert list(then.node[0].input) == ["x", "w.transpose"]
    np.testing.assert_array_equal(evaluate(folded["w.transpose"], {"w": W}), W.T)


def test_a_parameter_that_a_body_reads_as_it_is_stays():
    model, parameters = model_of(BRANCHES.replace("Neg(x)", "Neg(w)"), "float zero = {0}, float[3, 2] t")
    assert fold(model, parameters) == {}


@pytest.mark.parametrize(
    ("nodes", "values"),
    [
        ("t = Transpose(w) m = MatMul(x, t) y = MatMul(m, w)", "float[3, 2] t"),  # tied: it would be there twice
        ("t = Transpose(w) y = MatMul(x, t)", "float[3, K] t"),
        ("a = Abs(x) y = Mul(a, w)", "float[2, 3] a"),
    ],
    ids=["tied", "no shape", "no weight alone"],
)
def test_what_is_left_to_the_graph(nodes, values):
    model, parameters = model_of(nodes, values)
    before = [node.op_type for node in model.graph.node]
    assert fold(model, parameters) == {}
    assert left(model) == (before, {})
