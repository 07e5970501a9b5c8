"""What is read of a router, whatever it hands to the experts, and why it is refused."""

import numpy as np
import onnx
import onnx.parser
import pytest

from graph_passes.describe import inspect_model, read_model
from graph_passes.model_file import load_graph
from graph_passes.optimize import optimize
from graph_passes.record.block import FormError
from graph_passes.routers import Weights, read_gates, read_logits, read_masked, read_slots
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from tests.graph_passes.block_models import ROUTERS, compute, plan, save, spec_of, weights, why_not
from tests.zoo import RUNNER

KINDS = {
    "softmax": "softmax, top-k",
    "softmax_renormalised": "softmax, top-k, renormalised",
    "softmax_masked": "softmax, top-k, renormalised",
    "softmax_bias": "softmax, selection bias, top-k, renormalised",
    "softmax_groups": "softmax, 2 of 4 groups, top-k",
    "topk_first": "top-k, softmax",
    "topk_first_scattered": "top-k, softmax",
    "sigmoid": "sigmoid, top-k",
    "sigmoid_bias": "sigmoid, selection bias, top-k, renormalised",
    "sigmoid_bias_eps": "sigmoid, selection bias, top-k, renormalised",
    "sigmoid_bias_groups": "sigmoid, selection bias, 1 of 2 groups, top-k, renormalised",
    "sparsemixer": "sparsemixer, top-k",
    "switch": "softmax, top-k",
    "switch_capacity": "softmax, top-k, capacity",
    "nllb": "softmax, top-k, renormalised",
    "nllb_capacity": "softmax, top-k, capacity, renormalised",
    "vmoe": "softmax, top-k, capacity",
    "llama4": "top-k, sigmoid",
    "sigmoid_biased_logits": "selection bias, top-k, sigmoid, renormalised",
    "sqrtsoftplus": "sqrtsoftplus, selection bias, top-k, renormalised",
    "own_scales": "softmax, top-k, renormalised, scaled by expert",
}
FORMS = ("batched_mm", "stacked", "dispatch")
"""Slots, gates, and gates spread over places."""


@pytest.mark.parametrize("style", [{}, {"unoptimised": True, "linear": "matmul"}, {"opset": 17, "rank": 3}])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_kind_is_read_as_it_was_written(tmp_path, name, style):
    for form in FORMS:
        spec = spec_of(form, name, **style)
        if why_not(spec) is not None:
            continue
        save(spec, tmp_path / "block.onnx")
        (block,) = read_model(tmp_path / "block.onnx").blocks
        router, tensors = block.router, weights(spec)
        assert (router.top_k, router.scale, router.groups) == (spec.top_k, spec.scale, spec.groups)
        assert router.eps == pytest.approx(spec.eps)
        assert router.eps_clips == spec.eps_clips
        assert router.jitter_eps == pytest.approx(spec.jitter_eps if name == "sparsemixer" else 0)
        assert block.weights_on == spec.weights_on
        np.testing.assert_array_equal(router.weight_EH.load(), tensors["router"])
        assert (router.selection_bias_E is None) != spec.selection_bias
        if form != "dispatch":  # whose places are as many as a sequence has tokens, where there is no capacity
            assert router.kind == KINDS[name]
        if spec.capacity is not None and router.capacity is not None:
            assert int(router.capacity.limit.values) == spec.capacity
            assert router.capacity.by_slot == (spec.top_k > 1)
            by_sequence = form == "dispatch" or (spec.rank == 3 and name == "switch_capacity")  # NLLB counts all tokens
            assert (router.capacity.sequence is not None) == by_sequence
            assert router.capacity.before_renormalisation == spec.renormalize


@pytest.mark.parametrize(
    "biases",
    [
        ["b = Add (logits, bias)"],
        ["a = Add (bias, logits)", "b = Add (a, mask)"],
        ["b = Where (keep, logits, low)"],
        ["b = Where (drop, low, logits)"],
        ["a = Where (keep, logits, five)", "b = Add (a, bias)"],
        ["a = Add (logits, five)", "b = Add (a, five_by_half)"],
    ],
    ids=["bias", "bias and mask", "where", "where the other way", "a finite constant", "scalars"],
)
def test_biases_and_masks_are_one_vector(tmp_path, biases):
    """What the record computes is what the graph computes, also where a constant takes the place of a logit."""
    body = ["logits = MatMul (x, w)", *biases, "gates = Softmax <axis = -1> (b)"]
    graph, weights_of = parsed(tmp_path, body)
    router = read_gates(tensor(graph, "gates"), weights_of)
    assert router.bias_E is not None
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    logits = x @ router.weight_EH.load().T + router.bias_E.load()
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    got = RUNNER.run(tmp_path / "router.onnx", [{"x": x}])[0]["gates"]
    np.testing.assert_allclose(exponentials / exponentials.sum(-1, keepdims=True), got, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "projection",
    [
        ["logits = MatMul (x, w)"],
        ["turned = Transpose <perm = [1, 0]> (by_row)", "logits = MatMul (x, turned)"],
        ["logits = Gemm <transB = 1> (x, by_row)"],
        ['logits = Einsum <equation = "th,he->te"> (x, w)'],
        ['logits = Einsum <equation = "th, eh -> te"> (x, by_row)'],
    ],
)
def test_a_projection_may_be_written_in_many_ways(tmp_path, projection):
    graph, weights_of = parsed(tmp_path, [*projection, "gates = Sigmoid (logits)"])
    router = read_gates(tensor(graph, "gates"), weights_of)
    np.testing.assert_array_equal(router.weight_EH.load(), CONSTANTS["by_row"])
    assert (router.hidden.name, router.kind, router.top_k, router.is_ranked) == ("x", "sigmoid, top-k", 6, False)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_router_may_read_something_else_than_the_experts(tmp_path, rank):
    spec, path = spec_of("stacked", "softmax_renormalised", rank=rank), tmp_path / "block.onnx"
    save(spec, path)
    model = onnx.load(path)
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    bent = onnx.helper.make_node("Tanh", [gemm.input[0]], ["bent"])
    gemm.input[0] = "bent"
    model.graph.node.insert(list(model.graph.node).index(gemm), bent)
    onnx.save(model, path)
    for form in ("dense", "sorted"):
        manifest = optimize(path, tmp_path / form, RUNNER, plan=plan(spec, (1, 4, 5), onnx_sha256(path)), form=form)
        assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5


CONSTANTS = {
    "w": np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32),
    "by_row": np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32).T,
    "short": np.array([True, False, True]),
    "bias": np.arange(6, dtype=np.float32),
    "mask": np.array([[0, -np.inf, 0, 0, -1e4, 0]], np.float32),
    "keep": np.array([1, 0, 1, 1, 1, 0], bool),
    "drop": np.array([[0, 1, 0, 0, 0, 1]], bool),
    "low": np.float32(-np.inf),
    "five": np.float32(5),
    "five_by_half": np.array([2.5], np.float32),
    "zero": np.float32(0),
    "two": np.array([2], np.int64),
    "last": np.array([-1], np.int64),
    "experts": np.arange(6),
    "first_axis": np.array(0, np.int64),
    "three": np.array(3, np.int64),
    "places": np.array([1, 3, 5], np.int64),
}
SCORED = ["logits = MatMul (x, w)", "scores = Softmax <axis = -1> (logits)", "best, ids = TopK (scores, two)"]
ONE = [*SCORED[:2], "id = ArgMax <axis = -1, keepdims = 1> (scores)", "hit = Equal (id, experts)"]
COUNTED = [*ONE, "number = Cast <to = 7> (hit)", "place = CumSum (number, first_axis)"]


def parsed(folder, body: list[str], output: str = "gates"):
    """The graph with these nodes, whose constants are `CONSTANTS`, and its weights."""
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    router (float[T, 4] x) => (float[T, N] {output}) {{ {" ".join(body)} }}"""
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    values = [(name, value) for name, value in CONSTANTS.items() if name in used]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in values)
    onnx.save(model, folder / "router.onnx")
    return load_graph(folder / "router.onnx"), Weights(folder)


def tensor(graph, name: str):
    return graph.tensors()[name]


@pytest.mark.parametrize(
    ("body", "reason", "node"),
    [
        (
            [*SCORED, "all = ReduceSum (scores, last)", "gates = Div (best, all)"],
            "the weights are divided by something else than their sum",
            "Div 'gates'",
        ),
        (
            ["logits = MatMul (x, w)", "scores = Tanh (logits)", "gates, ids = TopK (scores, two)"],
            "the scores are no softmax, sigmoid or root of a softplus of logits",
            "Tanh 'scores'",
        ),
        (
            ["logits = MatMul (x, w)", "large = Greater (logits, five)", "soft = Softplus (logits)",
             "bent = Where (large, logits, soft)", "scores = Sqrt (bent)", "gates, ids = TopK (scores, two)"],
            "the scores are no softmax, sigmoid or root of a softplus of logits",
            "Sqrt 'scores'",
        ),
        (
            [*SCORED, "own = GatherND (w, ids)", "gates = Mul (best, own)"],
            "the weights are neither values of the TopK nor scores gathered by its ids",
            "Mul 'gates'",
        ),
        (
            ["logits = MatMul (x, w)", "scores = Softmax <axis = 0> (logits)", "gates, ids = TopK (scores, two)"],
            "the softmax is not over the experts",
            "Softmax 'scores'",
        ),
        (
            [*SCORED[:2], "gates, ids = TopK <largest = 0> (scores, two)"],
            "the TopK does not take the largest of the last axis",
            "TopK 'gates'",
        ),
        (
            [*SCORED[:2], "cut = Where (keep, scores, five)", "gates, ids = TopK (cut, two)"],
            "a Where before the TopK does not exclude experts with -inf or 0",
            "Where 'cut'",
        ),
        (
            [*SCORED[:2], "squares = Mul (scores, scores)", "top, ids = TopK (squares, two)",
             "gates = GatherElements <axis = 1> (scores, ids)"],
            "what is ranked is not the scores plus a constant bias",
            "Mul 'squares'",
        ),
        (
            [*SCORED, "gates = Exp (best)"],
            "the weights are neither values of the TopK nor scores gathered by its ids",
            "Exp 'gates'",
        ),
        (
            ["logits = MatMul (x, w)", "shifted = Add (logits, x)", "scores = Sigmoid (shifted)",
             "gates, ids = TopK (scores, two)"],
            "the logits are no Gemm or MatMul",
            "Add 'shifted'",
        ),
        (
            ["logits = MatMul (x, w)", "cut = Where (short, logits, low)", "scores = Sigmoid (cut)",
             "gates, ids = TopK (scores, two)"],
            "a mask over the logits has 3 entries, expected 6",
            "Where 'cut'",
        ),
        (
            ['logits = Einsum <equation = "th,hh->th"> (x, w)', "scores = Sigmoid (logits)",
             "gates, ids = TopK (scores, two)"],
            "the router's Einsum is no projection",
            "Einsum 'logits'",
        ),
        (
            ["logits = Gemm <alpha = 0.5> (x, w)", "scores = Sigmoid (logits)", "gates, ids = TopK (scores, two)"],
            "the router's Gemm scales or transposes",
            "Gemm 'logits'",
        ),
    ],
)  # fmt: skip
def test_slots_that_are_none_are_refused_with_the_node(tmp_path, body, reason, node):
    graph, weights_of = parsed(tmp_path, [*body, "out = Identity (ids)"])
    with pytest.raises(FormError) as error:
        read_slots(tensor(graph, "ids"), tensor(graph, "gates"), weights_of)
    assert (error.value.reason, error.value.node) == (reason, node)


@pytest.mark.parametrize(
    ("body", "reason", "node"),
    [
        (
            [*SCORED, "gates = ScatterElements <axis = 1> (scores, ids, best)"],
            "the gates are not scattered into zeros along the experts",
            "ScatterElements 'gates'",
        ),
        (
            [*SCORED, "base = Sub (scores, scores)", "all = Add (base, low)",
             "kept = ScatterElements <axis = 1> (all, ids, best)", "gates = Softmax <axis = -1> (kept)"],
            "the scores are not of the best logits scattered into -inf",
            "ScatterElements 'kept'",
        ),
        (
            [*SCORED[:2], "gates = Tanh (scores)"],
            "Tanh makes no gates of a known router",
            "Tanh 'gates'",
        ),
        (
            [*COUNTED, "inside = Equal (place, places)", "full = Cast <to = 1> (inside)", "both = Mul (full, scores)",
             "spread = Cast <to = 1> (hit)", "gates = Mul (both, spread)"],
            "places are compared with something else than 0, 1, 2 ...",
            "Equal 'inside'",
        ),
        (
            [*COUNTED, "shape = Shape (x)", "count = ReduceMax <keepdims = 0> (shape)", "later = Sub (place, three)",
             "inside = Less (later, count)", "full = Cast <to = 1> (inside)", "both = Mul (full, scores)",
             "spread = Cast <to = 1> (hit)", "gates = Mul (both, spread)"],
            "a computed capacity is off by one",
            "Less 'inside'",
        ),
        (
            [*ONE, "other = ArgMax <axis = -1, keepdims = 1> (logits)", "again = Equal (other, experts)",
             "one = Cast <to = 1> (hit)", "two_hits = Cast <to = 1> (again)", "first = Mul (scores, one)",
             "second = Mul (scores, two_hits)", "gates = Add (first, second)"],
            "the second choice is not made without the first",
            "ArgMax 'other'",
        ),
    ],
)  # fmt: skip
def test_gates_that_are_none_are_refused_with_the_node(tmp_path, body, reason, node):
    graph, weights_of = parsed(tmp_path, body)
    with pytest.raises(FormError) as error:
        read_gates(tensor(graph, "gates"), weights_of)
    assert (error.value.reason, error.value.node) == (reason, node)


def test_excluding_groups_with_0_is_refused_where_a_bias_can_be_lower(tmp_path):
    spec = spec_of("stacked", "softmax_groups", selection_bias=True)
    save(spec, tmp_path / "block.onnx")
    graph = load_graph(tmp_path / "block.onnx")
    topk = next(node for node in graph.nodes if node.op == "TopK" and node.inputs[0].name == "ranked")
    weights_of_topk = next(node for node in graph.nodes if node.op == "GatherElements").outputs[0]
    with pytest.raises(FormError) as error:
        read_slots(topk.outputs[1], weights_of_topk, Weights(tmp_path))
    assert error.value.reason == "experts of other groups are ranked as 0, which a score plus a bias can be below"
    assert error.value.node == "Where 'ranked'"


def test_a_mask_and_its_weights_may_lie_apart(tmp_path):
    graph, weights_of = parsed(tmp_path, [*ONE, "gates = ReduceMax (scores, last)", "out = Identity (hit)"])
    router = read_masked(tensor(graph, "hit"), tensor(graph, "gates"), weights_of)
    assert (router.kind, router.top_k) == ("softmax, top-k", 1)


def test_a_fused_op_routes_by_itself(tmp_path):
    graph, weights_of = parsed(tmp_path, ["logits = MatMul (x, w)", "gates = Identity (logits)"])
    router = read_logits(tensor(graph, "gates"), top_k=2, renormalize=True, weights_of=weights_of)
    assert (router.kind, router.slots, router.gates) == ("softmax, top-k, renormalised", None, None)


def test_groups_of_different_sizes_are_written_and_read_again(tmp_path):
    keep = (0, 1, 4, 5, 6)
    spec = spec_of("stacked", "sigmoid_bias_groups")
    save(spec, tmp_path / "block.onnx")
    optimize(
        tmp_path / "block.onnx", tmp_path / "out", RUNNER, plan=plan(spec, keep, onnx_sha256(tmp_path / "block.onnx"))
    )
    (block,) = read_model(tmp_path / "out").blocks
    assert (block.router.groups, block.router.group_of) == (spec.groups, (0, 0, 1, 1, 1))


@pytest.mark.parametrize("name", ["sparsemixer", "nllb", "nllb_capacity", "switch_capacity", "llama4", "softmax_bias"])
@pytest.mark.parametrize("keep", [(5,), (1, 6)])
def test_fewer_experts_than_a_router_selects_are_exact(tmp_path, name, keep):
    """Routers that choose one by one would choose the last expert twice, or one that is gone."""
    spec = spec_of("stacked", name)
    source = tmp_path / "block.onnx"
    save(spec, source)
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(spec, keep, onnx_sha256(source)), form="dense")
    x = np.random.default_rng(2).standard_normal((9, spec.hidden)).astype(np.float32)
    got = RUNNER.run(tmp_path / "out" / "model.onnx", [{"x": x}])[0]["out"]
    np.testing.assert_allclose(got, compute(spec, x, keep), rtol=1e-4, atol=1e-5)
    assert all(entry["agreeing"] == entry["tokens"] for entry in manifest.details["choices"])


REAL = {
    "batched_mm_phimoe": "sparsemixer, top-k",
    "batched_mm_phimoe_unoptimized": "sparsemixer, top-k",
    "batched_mm_ernie4_5_moe_unoptimized": "softmax, selection bias, top-k, renormalised",
    "batched_mm_deepseek_v3_unoptimized": "sigmoid, selection bias, 2 of 4 groups, top-k, renormalised",
    "batched_mm_ernie4_5_moe": "softmax, selection bias, top-k, renormalised",
    "batched_mm_deepseek_v2": "softmax, 2 of 4 groups, top-k",
    "masked_loop_switch": "softmax, top-k, capacity",
    "masked_loop_soft": "softmax, top-k",
    "masked_loop_ids": "sigmoid, selection bias, top-k, renormalised",
    "stacked_llama4": "top-k, sigmoid",
}


@pytest.mark.parametrize("name", REAL)
def test_routers_of_real_exports_are_exact_after_pruning(zoo, tmp_path, name):
    source = zoo.foreign(name)
    model = read_model(source)
    assert {block.router.kind for block in model.blocks} == {REAL[name]}
    for keep in ((0, 1, 5), (2,)):
        layers = tuple(
            LayerPlan(block.name, 8, min(block.router.top_k, len(keep)), keep, groups=block.router.groups)
            for block in model.blocks
        )
        made = PruningPlan(model.source_sha256, "by hand", layers)
        out = tmp_path / f"{len(keep)} experts"
        manifest = optimize(source, out, RUNNER, plan=made)
        assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
        assert all(entry["agreeing"] == entry["tokens"] for entry in manifest.details["choices"])
        assert inspect_model(out).unrecognised == ()
