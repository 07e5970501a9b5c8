"""The masked graphs compute what they are said to compute: by numpy, from the reachable experts alone."""

import numpy as np
import onnx
import pytest

from benchmarks.masked import FORMS, MASKED
from benchmarks.masked.constants import KEPT, SWIGLU, WIDTH, weights
from benchmarks.masked.routers import BEHIND, FEWER_IDS, ROUTERS, UNMASKED, WEAK, WHY
from tests.zoo import RUNNER

X_TH = np.random.default_rng(3).normal(size=(7, 64)).astype(np.float32)


def gates(graph, hidden_TH):
    """(T, E) what the reachable experts get."""
    logits = hidden_TH @ weights(graph.ffn)["router"].T.astype(np.float64)
    if graph.mask == WEAK:
        logits -= ~np.isin(np.arange(8), KEPT)
    elif graph.mask not in (*BEHIND, UNMASKED):
        logits[:, ~np.isin(np.arange(8), graph.reachable)] = -np.inf
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores[scores < np.sort(scores, axis=1)[:, -2:-1]] = 0
    spread = scores / scores.sum(axis=1, keepdims=True)
    return np.where(np.isin(np.arange(8), graph.reachable), spread, 0)


def ffn(kind, hidden_TH, expert):
    parts = {name: array[expert].astype(np.float64) for name, array in weights(kind).items()}
    up = hidden_TH @ parts["up"]
    if kind != SWIGLU:
        return np.maximum(up, 0) @ parts["down"]
    gate = hidden_TH @ parts["gate"]
    return gate / (1 + np.exp(-gate)) * up @ parts["down"]


@pytest.mark.parametrize("name", MASKED)
def test_a_graph_computes_what_its_reachable_experts_do(name, tmp_path):
    graph = MASKED[name]
    onnx.save(graph(), tmp_path / "masked.onnx")
    hidden_TH = (X_TH - X_TH.mean(axis=1, keepdims=True)) / np.sqrt(X_TH.var(axis=1, keepdims=True) + 1e-5)
    gates_TE = gates(graph, hidden_TH.astype(np.float64))
    expected = sum(gates_TE[:, [expert]] * ffn(graph.ffn, hidden_TH, expert) for expert in graph.reachable)
    (batch,) = RUNNER.run(tmp_path / "masked.onnx", [{"x": X_TH}])
    np.testing.assert_allclose(batch["out"], expected, atol=2e-5)


def test_every_form_and_every_mask_has_a_graph():
    assert {graph.form for graph in MASKED.values()} == set(FORMS)
    assert {graph.mask for graph in MASKED.values()} == set(ROUTERS) == set(WHY)
    assert MASKED[f"masked_loop.{FEWER_IDS}"].reachable == (0, 1)


def test_constants_are_shared_and_all_read():
    graph = MASKED["stacked.add"]().graph
    named = [tensor.name for tensor in graph.initializer]
    assert len(named) == len(set(named))
    read = {name for node in graph.node for name in node.input}
    assert set(named) <= read
    k = next(node.input[1] for node in graph.node if node.op_type == "TopK")
    assert sum(k in node.input for node in graph.node) > 1


def test_an_expert_is_of_the_same_size_in_both_kinds():
    sizes = {kind: sum(array[0].size for name, array in weights(kind).items() if name != "router") for kind in WIDTH}
    assert set(sizes.values()) == {24_576}


def test_what_must_stay_counts_the_rows_of_the_router_that_matter():
    expert, row = 24_576, 64
    assert MASKED["stacked.add"].needed == 2 * (expert + row)
    assert MASKED["if.constant_if"].needed == 2 * expert + 8 * row
    assert MASKED["stacked.unmasked"].needed == 8 * (expert + row)
