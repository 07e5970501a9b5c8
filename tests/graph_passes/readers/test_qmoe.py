"""``com.microsoft.QMoE``: packed weights are taken as they lie, and its router is what ONNX Runtime makes of it."""

from typing import Any

import numpy as np
import onnx
import pytest

from graph_passes.optimize import optimize
from moe_spec.errors import VerificationError
from moe_spec.experts_op import Activation
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL
from tests.graph_passes.block_models import Spec, plan
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import ALL, ONE, THREE, assert_pruned_exactly, blocks_of, edited, said, saved
from tests.zoo import RUNNER

WIDE: dict[str, Any] = {"hidden": 64, "width": 32, "opset": 21}
STORED = {
    "int4, blocks of 32": {},
    "int4, blocks of 16": {"block": 16},
    "int4 with zero points": {"zero_points": True},
    "int8": {"quantization": "int8"},
    "int8 with zero points": {"quantization": "int8", "zero_points": True},
    "biased": {"biased": True},
    "no gate": {"gated": False, "activation": Activation("gelu_tanh")},
    "float16": {"dtype": "float16"},
}
ROUTERS = ["softmax_renormalised", "softmax", "softmax_bias_only", "softmax_groups", "sigmoid", "sigmoid_bias_groups"]


def qmoe(router: str = "softmax_renormalised", **fields) -> Spec:
    if router == "softmax_bias_only":
        return spec_of("qmoe", **WIDE, selection_bias=True, renormalize=True)
    return spec_of("qmoe", router, **{**WIDE, "scale": 1.0, **fields})


def initialisers(path) -> dict[int, np.ndarray]:
    """Weights and their parts by where the fused node reads them."""
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if node.op_type == "QMoE")
    stored = {value.name: value for value in model.graph.initializer}
    parts = {index: stored.get(name) for index, name in enumerate(node.input)}
    folder = str(path.parent)
    return {index: onnx.numpy_helper.to_array(value, folder) for index, value in parts.items() if value is not None}


@pytest.mark.parametrize("form", ["sorted", "dense", "gather", "qmoe"])
@pytest.mark.parametrize("fields", STORED.values(), ids=STORED.keys())
def test_every_layout_is_pruned_exactly(tmp_path, fields, form):
    assert_pruned_exactly(qmoe(**fields), tmp_path, THREE, form=form)


@pytest.mark.parametrize("fields", STORED.values(), ids=STORED.keys())
def test_the_bytes_of_kept_experts_are_the_original_ones(tmp_path, fields):
    assert_pruned_exactly(qmoe(**fields), tmp_path, THREE, form="qmoe")
    before, after = initialisers(tmp_path / "block.onnx"), initialisers(tmp_path / "out" / MODEL)
    assert before.keys() == after.keys()
    for index, array in before.items():
        assert array[list(THREE)].tobytes() == after[index].tobytes()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("keep", [THREE, ONE, ALL], ids=["3 of 8", "1 of 8", "all"])
def test_every_router_that_the_op_takes(tmp_path, router, keep):
    spec = qmoe(router)
    if spec.groups is not None and keep == THREE:
        keep = (0, 1, 4, 5)
    assert_pruned_exactly(spec, tmp_path, keep, form="sorted")


def test_the_attribute_that_normalises_changes_nothing_without_router_weights(tmp_path):
    def unset(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "QMoE")
        next(entry for entry in node.attribute if entry.name == "normalize_routing_weights").i = 0

    spec = qmoe()
    with_it = saved(spec, tmp_path)
    (tmp_path / "without").mkdir()
    without = edited(spec, tmp_path / "without", unset)
    x = np.random.default_rng(0).standard_normal((5, spec.hidden)).astype(np.float32)
    one, other = (RUNNER.run(path, [{"x": x}])[0]["out"] for path in (with_it, without))
    np.testing.assert_array_equal(one, other)
    (block,) = blocks_of(without, "qmoe")
    assert block.router.renormalize


def test_weights_divided_by_the_sum_of_all_experts_are_refused(tmp_path):
    """Unless the op divides by the sum of those that it selects."""

    def divide(graph: onnx.GraphProto) -> None:
        op, node = onnx.helper.make_node, graph.node[-1]
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "experts_axis"))
        scores = node.input[14]
        before = [
            op("ReduceSum", [scores, "experts_axis"], ["sum_of_all"], keepdims=1),
            op("Div", [scores, "sum_of_all"], ["shares"]),
        ]
        node.input[1] = node.input[14] = "shares"
        nodes = [*list(graph.node)[:-1], *before, graph.node[-1]]
        del graph.node[:]
        graph.node.extend(nodes)

    assert said(edited(qmoe("sigmoid"), tmp_path, divide), "qmoe") == [
        "qmoe: router_weights are divided by the sum of all (at QMoE 'out')"
    ]
    (block,) = blocks_of(edited(qmoe("sigmoid", renormalize=True), tmp_path, divide), "qmoe")
    assert (block.router.score, block.router.top_k, block.router.renormalize) == ("sigmoid", 2, True)


def test_eight_bits_in_blocks_keep_their_form_because_the_kernel_rounds_what_it_reads(tmp_path):
    """The kernel computes with activations of 8 bits; the float forms do not, and the proof tells."""
    spec = qmoe()

    def in_blocks(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "QMoE")
        next(entry for entry in node.attribute if entry.name == "expert_weight_bits").i = 8
        for name in (node.input[2], node.input[5]):
            value = next(value for value in graph.initializer if value.name == name)
            nibbles = onnx.numpy_helper.to_array(value)
            octets = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(*nibbles.shape[:2], -1) * 16
            value.CopyFrom(onnx.numpy_helper.from_array(octets.astype(np.uint8), name))

    source = edited(spec, tmp_path, in_blocks)
    made = plan(spec, THREE, onnx_sha256(source))
    manifest = optimize(source, tmp_path / "qmoe", RUNNER, plan=made, form="qmoe")
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    with pytest.raises(VerificationError):
        optimize(source, tmp_path / "sorted", RUNNER, plan=made, form="sorted")


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("quant_type", "fp4", "quant_type is 'fp4', expected 'int'"),
        ("expert_weight_bits", 2, "fc1 has 2 bits, expected uint8 (E, out, in) of 4 or 8 bits with scales"),
        ("block_size", 16, "fc1 of shape [8, 64, 64] has scales [8, 64, 2]"),
        ("k", 9, "k is 9, but there are 8 experts"),
    ],
)
def test_near_misses_are_refused(tmp_path, attribute, value, reason):
    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.op_type == "QMoE")
        kept = [entry for entry in node.attribute if entry.name != attribute]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])

    assert said(edited(qmoe(), tmp_path, change), "qmoe") == [f"qmoe: {reason} (at QMoE 'out')"]
