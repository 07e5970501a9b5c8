"""What moves tokens is found out by doing it, and nothing else is done."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from graph_passes.model_file import load_graph
from graph_passes.readers.trial.interpreter import Interpreter
from graph_passes.readers.trial.trial import Trial, told_apart
from graph_passes.record.block import FormError
from graph_passes.routers import Weights


def started(body: str, folder: Path, tokens: int = 5):
    """An interpreter of ``body``, from ``x (B, S, 4)`` to ``y``; and its values by name."""
    head = '<ir_version: 10, opset_import: ["" : 20]> m (float[b, s, 4] x) => (float[t, n] y)'
    onnx.save(onnx.parser.parse_model(f"{head} {{ {body} }}"), folder / "m.onnx")
    graph = load_graph(folder / "m.onnx")
    return Interpreter(Weights(folder), tokens), graph.tensors()


def test_a_value_is_computed_from_what_is_given_however_the_graph_computes_it(tmp_path):
    run, values = started("ids = Sqrt(x) k = Constant<value_ints = [2]>() y = Div(ids, k)", tmp_path)
    run.give(values["ids"], np.asarray([6, 9]))
    np.testing.assert_array_equal(run.of(values["y"]), [3, 4])


def test_an_input_is_one_sequence_of_all_tokens(tmp_path):
    run, values = started("y = Shape(x)", tmp_path, tokens=5)
    np.testing.assert_array_equal(run.of(values["y"]), [1, 5, 4])


def test_the_shape_of_what_can_be_computed_is_its_own(tmp_path):
    run, values = started("k = Constant<value_ints = [-1]>() flat = Reshape(x, k) y = Shape(flat)", tmp_path)
    run.give(values["x"], np.zeros((2, 3, 4)))
    np.testing.assert_array_equal(run.of(values["y"]), [24])


REFUSALS = {
    "arithmetic of the model": ("y = Softmax(x)", "Softmax is no op that picks, sorts or returns tokens (Softmax 'y')"),
    "an input": ("y = Neg(x)", "where tokens go depends on something else than the router (value 'x')"),
    "shapes that do not fit": (
        "a = Constant<value_ints = [1, 2]>() b = Constant<value_ints = [1, 2, 3]>() y = Add(a, b)",
        "Add does not fit the tokens that it gets: operands could not be broadcast together with shapes (2,) (3,)  "
        "(Add 'y')",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_moves_no_tokens_is_refused_at_its_node(tmp_path, name):
    body, reason = REFUSALS[name]
    run, values = started(body, tmp_path)
    with pytest.raises(FormError) as refusal:
        run.of(values["y"])
    assert f"{refusal.value.reason} ({refusal.value.node})" == reason


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 1), (3, 2), (8, 2), (8, 7), (128, 8), (64, 64)])
@pytest.mark.parametrize("tokens", [None, 40])
def test_decisions_tell_all_experts_apart_by_their_counts(experts, top_k, tokens):
    counts = []
    for loads in told_apart(experts, None if tokens is None else tokens * top_k):
        trial = Trial(experts, top_k, 1, tokens=tokens, loads=loads)
        assert all(len(set(row)) == top_k for row in trial.ids_TK.tolist())
        assert tokens in (None, len(trial.ids_TK))
        counts.append(np.bincount(trial.ids_TK.reshape(-1), minlength=experts).tolist())
    assert min(map(min, counts)) >= 1
    assert top_k == experts or len(set(zip(*counts, strict=True))) == experts


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (lambda: Trial(10_000, 9_999, 1, loads=told_apart(10_000, None)[0]), "K=9999 of 10000 experts cannot be tried"),
        (lambda: Trial(8, 2, 1, tokens=3), "K=2 of 8 experts cannot be tried on 3 tokens"),
        (lambda: Trial(2, 3, 1), "the router selects K=3 of 2 experts"),
        (lambda: told_apart(8, 8), "the graph has 8 slots for tokens, too few to tell 8 experts apart"),
    ],
)
def test_what_cannot_be_tried_is_refused(attempt, reason):
    with pytest.raises(FormError) as refusal:
        attempt()
    assert refusal.value.reason.startswith(reason)
