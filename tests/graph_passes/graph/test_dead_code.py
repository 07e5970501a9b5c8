"""What a rewrite leaves behind: nothing that nobody reads, and nothing of what others read changed."""

import dataclasses
from collections import Counter

import numpy as np
import onnx
import onnx.parser
import pytest

from graph_passes.graph.protos import every_graph, every_node
from graph_passes.optimize import optimize
from moe_spec.experts_op import DOMAIN
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL, OBSERVED
from tests.graph_passes.block_models import NAME, Spec, plan, save
from tests.zoo import RUNNER

KEEP = (0, 2, 5)
FORMS = ("dense", "sorted", "gather")


def leftovers(path) -> dict[str, list[str]]:
    """What the graph has and nobody reads, by kind."""
    model = onnx.load(path, load_external_data=False)
    nodes = list(every_node(model.graph))
    read = Counter(name for node in nodes for name in node.input)
    read.update(value.name for part in every_graph(model.graph) for value in part.output)
    called = {(node.domain, node.op_type) for node in nodes}
    domains = {node.domain for node in nodes} | {""}
    return {
        "initializers": [tensor.name for tensor in model.graph.initializer if not read[tensor.name]],
        "inner initializers": [t.name for part in list(every_graph(model.graph))[1:] for t in part.initializer],
        "nodes": [node.name for node in nodes if not any(read[name] for name in node.output)],
        "functions": [entry.name for entry in model.functions if (entry.domain, entry.name) not in called],
        "opsets": [entry.domain for entry in model.opset_import if entry.domain not in domains],
    }


def assert_clean(directory) -> None:
    for file in (MODEL, OBSERVED):
        assert {kind: names for kind, names in leftovers(directory / file).items() if names} == {}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "spec",
    [Spec(), Spec(biased=True, router_bias=True, interleaved=True), Spec(form="batched_mm"), Spec(in_function=True)],
    ids=["experts", "biased", "batched_mm", "function"],
)
def test_nothing_is_left_that_nobody_reads(tmp_path, spec, form):
    path = tmp_path / "block.onnx"
    save(spec, path)
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(400, np.float32), "forgotten"))
    model.opset_import.add(domain="forgotten", version=1)
    onnx.save(model, path)
    optimize(path, tmp_path / "out", RUNNER, plan=plan(spec, KEEP, onnx_sha256(path)), form=form)
    assert_clean(tmp_path / "out")


def test_our_function_goes_with_the_last_node_that_calls_it(tmp_path):
    path, spec = tmp_path / "two.onnx", Spec(layers=2)
    save(spec, path)
    first = dataclasses.replace(plan(spec, KEEP, onnx_sha256(path)), layers=(LayerPlan(NAME, 8, 2, KEEP),))
    optimize(path, tmp_path / "one", RUNNER, plan=first, form="auto")
    both = plan(spec, KEEP, onnx_sha256(path))
    optimize(path, tmp_path / "none", RUNNER, plan=both, form="auto")
    counts = {}
    for name in ("one", "none"):
        assert_clean(tmp_path / name)
        model = onnx.load(tmp_path / name / MODEL, load_external_data=False)
        counts[name] = (len(model.functions), [entry.domain for entry in model.opset_import])
    assert counts == {"one": (1, ["", DOMAIN]), "none": (0, [""])}


def test_a_weight_that_two_layers_share_is_cloned(tmp_path):
    path, spec = tmp_path / "tied.onnx", Spec(layers=2, tied=True)
    save(spec, path)
    first = dataclasses.replace(plan(spec, KEEP, onnx_sha256(path)), layers=(LayerPlan(NAME, 8, 2, KEEP),))
    manifest = optimize(path, tmp_path / "out", RUNNER, plan=first)
    assert [block.experts for block in manifest.blocks] == [3, 8]
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert_clean(tmp_path / "out")


def test_a_constant_that_many_nodes_share_is_left_to_them(tmp_path):
    """[2] is K, and the axis of something else."""
    path, spec = tmp_path / "block.onnx", Spec(form="batched_mm")
    save(spec, path)
    model = onnx.load(path)
    (topk,) = (node for node in model.graph.node if node.op_type == "TopK")
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Unsqueeze", ["before", topk.input[1]], ["out"]))
    model.graph.output[0].type.tensor_type.shape.dim.add(dim_value=1)
    onnx.save(model, path)
    manifest = optimize(path, tmp_path / "out", RUNNER, plan=plan(spec, (4,), onnx_sha256(path)))
    assert [block.top_k for block in manifest.blocks] == [1]
    assert_clean(tmp_path / "out")


BODY = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[tokens, 8] before) => (float[tokens, 8] out) {
    axes = Constant<value_ints = [0, 1]>()
    total = ReduceSum<keepdims = 0>(before, axes)
    zero = Constant<value_float = 0.0>()
    positive = Greater(total, zero)
    out = If(positive) <
        then_branch = t () => (float[tokens, 8] a) { two = Constant<value_float = 2.0>()  p = MatMul(before, matrix)
            a = Mul(p, two) },
        else_branch = e () => (float[tokens, 8] b) { p = Add(before, total)  b = MatMul(p, matrix) }>
}
"""


def test_what_a_body_takes_from_around_it_counts_as_read(tmp_path):
    path, spec = tmp_path / "block.onnx", Spec(hidden=8)
    save(spec, path)
    model, tail = onnx.load(path), onnx.parser.parse_model(BODY)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend(tail.graph.node)
    matrix = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    wide = np.concatenate([matrix] * 8, axis=1)[:, :8]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(wide), "matrix"))
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=64)
    manifest = optimize(
        path, tmp_path / "out", RUNNER, plan=plan(spec, KEEP, onnx_sha256(path, ["weights"])), form="dense"
    )
    assert_clean(tmp_path / "out")
    assert "If" in [node.op_type for node in onnx.load(tmp_path / "out" / MODEL).graph.node]
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
