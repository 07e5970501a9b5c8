"""Experts in the bodies of control flow are refused by name; control flow without experts is not."""

import onnx
import onnx.parser
import pytest

from benchmarks.masked import MASKED
from graph_passes.describe import inspect_model
from graph_passes.optimize import optimize
from graph_passes.record.block import Refusal
from moe_spec.errors import UserError
from tests.graph_passes.block_models import Spec, save
from tests.graph_passes.text_files import written
from tests.zoo import RUNNER


def refused(path) -> list[Refusal]:
    """What is said of control flow."""
    found = inspect_model(path).unrecognised
    return [refusal for layer in found for refusal in layer.refusals if refusal.form == "control flow"]


@pytest.mark.parametrize(
    ("name", "nodes"), [("scan.add", ["Scan 'out'"]), ("if.add", [f"If 'gated_{e}'" for e in range(8)])]
)
def test_experts_in_a_body_are_refused_by_name(tmp_path, name, nodes):
    onnx.save(MASKED[name](), tmp_path / "masked.onnx")
    assert [str(refusal) for refusal in refused(tmp_path / "masked.onnx")] == [
        f"control flow: experts inside the body of {node} are not read; no exporter emits them (at {node})"
        for node in nodes
    ]
    with pytest.raises(UserError, match=f"experts inside the body of {nodes[0]} are not read"):
        optimize(tmp_path / "masked.onnx", tmp_path / "out", RUNNER)
    assert not (tmp_path / "out").exists()


def wrapped(spec: Spec, path) -> None:
    """A model whose only node is an ``If`` that holds the whole block in one branch."""
    save(spec, path)
    model = onnx.load(path)
    results = list(model.graph.output)
    block = onnx.helper.make_graph(list(model.graph.node), "block", [], results)
    plain = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["out"])], "plain", [], results)
    del model.graph.node[:]
    model.graph.node.append(
        onnx.helper.make_node("If", ["wanted"], ["out"], name="branch", then_branch=block, else_branch=plain)
    )
    model.graph.input.append(onnx.helper.make_tensor_value_info("wanted", onnx.TensorProto.BOOL, []))
    onnx.save(model, path)


@pytest.mark.parametrize("form", ["experts", "batched_mm", "stacked"])
def test_a_whole_layer_in_a_body_is_refused_by_name(tmp_path, form):
    wrapped(Spec(form=form), tmp_path / "block.onnx")
    (layer,) = inspect_model(tmp_path / "block.onnx").unrecognised
    assert str(layer) == (
        "layer at If 'branch':\n  control flow: experts inside the body of If 'branch' are not read; "
        "no exporter emits them (at If 'branch')"
    )


ORDINARY = {
    "a dense layer in a branch": """
    y = If(flag) < then_branch = t () => (float[N, 8] a) { p = MatMul(out, w)  a = Relu(p) },
                   else_branch = e () => (float[N, 8] b) { b = MatMul(out, w) }>""",
    "dense layers in a scan": """
    y = Scan<num_scan_inputs = 1, body = step (float[N, 8] h, float[8, 8] w_here) => (float[N, 8] next) {
        p = MatMul(h, w_here)  next = Relu(p) }>(out, stack)""",
    "a sampler in a loop": """
    y = Loop(steps, flag, out) < body = step (int64 i, bool go, float[N, 8] h) => (bool on, float[N, 8] next) {
        logits = MatMul(h, w)  best, ids = TopK(logits, one)  scaled = Mul(best, half)  flat = Reshape(ids, all)
        rows = Gather<axis = 0>(w, flat)  next = Add(h, rows)  on = Identity(go) }>""",
}
"""Behind a block: what control flow usually does."""


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_control_flow_is_none_of_our_business(tmp_path, kind):
    path = tmp_path / "block.onnx"
    save(Spec(), path)
    model = onnx.load(path)
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[N, 8] out, bool flag, int64 steps) => (float[N, 8] y)
    <float[8, 8] w = {{{", ".join(["0.1"] * 64)}}}, float[2, 8, 8] stack = {{{", ".join(["0.1"] * 128)}}},
     int64[1] one = {{1}}, int64[1] all = {{-1}}, float half = {{0.5}}> {{ {ORDINARY[kind]} }}"""
    tail = onnx.parser.parse_model(text).graph
    model.graph.node.extend(tail.node)
    model.graph.initializer.extend(tail.initializer)
    model.graph.input.extend(value for value in tail.input if value.name != "out")
    model.graph.output[0].CopyFrom(tail.output[0])
    onnx.save(model, path)
    found = inspect_model(path)
    assert (len(found.blocks), found.unrecognised) == (1, ())


def test_control_flow_alone_is_no_layer(tmp_path):
    path = written(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[N, 4] x, bool flag) => (float[N, 4] y) {
            y = If(flag) < then_branch = t () => (float[N, 4] a) { a = Relu(x) },
                           else_branch = e () => (float[N, 4] b) { b = Neg(x) }>
        }""",
        tmp_path / "model.onnx",
    )
    found = inspect_model(path)
    assert (found.blocks, found.unrecognised) == ((), ())
