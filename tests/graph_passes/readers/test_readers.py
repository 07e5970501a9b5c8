"""What readers find, and why they refuse."""

import numpy as np
import onnx
import onnx.parser
import pytest

from graph_passes.describe import inspect_model, read_model
from graph_passes.model_file import load_graph
from graph_passes.optimize import optimize
from graph_passes.readers import READERS, read_blocks
from moe_spec.errors import UserError
from moe_spec.experts_op import Activation
from moe_spec.feasibility import Groups
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from tests.graph_passes.block_models import NAME, Spec, plan, save, spec_of, weights
from tests.graph_passes.readers.proofs import THREE, node_of
from tests.zoo import RUNNER

SILU = Activation("silu")
CLAMPED_SILU = Activation("silu", float(np.float32(1.702)), 7.0, 1.0)

ROUTERS = {
    "vmoe": "softmax, top-k",
    "mixtral": "softmax, top-k, renormalised",
    "qwen3_moe": "softmax, top-k, renormalised",
    "olmoe": "softmax, top-k",
    "deepseek_v3": "sigmoid, selection bias, 1 of 2 groups, top-k, renormalised",
    "gpt_oss": "top-k, softmax",
    "granitemoe": "top-k, softmax",
}
ACTIVATIONS = dict.fromkeys(ROUTERS, SILU) | {"vmoe": Activation("gelu"), "gpt_oss": CLAMPED_SILU}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("form", ["experts", "batched_mm"])
def test_both_forms_of_a_family_give_one_record(zoo, name, form):
    model = inspect_model(zoo.exported(name) if form == "experts" else zoo.batched_mm(name))
    assert model.unrecognised == ()
    assert [block.form for block in model.blocks] == [form, form]
    ours = read_model(zoo.exported(name)).blocks
    for block, same in zip(model.blocks, ours, strict=True):
        assert (block.name, block.num_experts, block.router.top_k) == (same.name, 8, 2)
        assert block.router.kind == ROUTERS[name]
        assert block.experts.activation == ACTIVATIONS[name]
        for found, wanted in zip(block.experts.weights(), same.experts.weights(), strict=True):
            np.testing.assert_array_equal(found.load(), wanted.load())


def test_scale_and_groups_are_read(zoo):
    router = read_model(zoo.exported("deepseek_v3")).blocks[0].router
    assert (router.scale, router.groups, router.group_of) == (2.5, Groups(2, 1), (0, 0, 0, 0, 1, 1, 1, 1))


def test_reading_changes_nothing(tmp_path):
    save(Spec(), tmp_path / "block.onnx")
    graph = load_graph(tmp_path / "block.onnx")
    before = [(node.op, [tensor.name for tensor in (*node.inputs, *node.outputs)]) for node in graph.nodes]
    read_blocks(graph, tmp_path)
    assert [(node.op, [tensor.name for tensor in (*node.inputs, *node.outputs)]) for node in graph.nodes] == before


def edited(spec: Spec, path, **replacements: str):
    """The model of ``spec`` with ops renamed, e.g. Softmax="Tanh"."""
    save(spec, path)
    model = onnx.load(path)
    for node in model.graph.node:
        node.op_type = replacements.get(node.op_type, node.op_type)
        if node.op_type in replacements.values():
            del node.attribute[:]
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("spec", "replacements", "reason"),
    [
        (
            Spec(),
            {"Softmax": "Tanh"},
            "experts: the scores are no softmax, sigmoid or root of a softplus of logits (at Tanh 'scores')",
        ),
        (Spec(), {"Gemm": "Max"}, "experts: the logits are no Gemm or MatMul (at Max 'logits')"),
        (
            Spec(renormalize=True),
            {"ReduceSum": "ReduceMax"},
            "experts: the weights are divided by something else than their sum (at Div 'normalized')",
        ),
        (
            Spec(score="sigmoid", selection_bias=True),
            {"Add": "Sub"},
            "experts: what is ranked is not the scores plus a constant bias (at Sub 'choice')",
        ),
        (
            Spec(score="sigmoid", groups=Groups(2, 1)),
            {"ReduceSum": "ReduceMax"},
            "experts: groups are not runs of what is ranked (at ReduceMax 'group_scores')",
        ),
    ],
)
def test_a_router_that_is_none_is_refused_with_the_node(tmp_path, spec, replacements, reason):
    path = tmp_path / "block.onnx"
    edited(spec, path, **replacements)
    (layer,) = inspect_model(path).unrecognised
    assert str(layer.refusals[0]) == reason
    with pytest.raises(UserError) as error:
        read_model(path)
    assert error.value.what == f"{path}: 1 MoE layer(s) not recognised\n{layer}"
    assert error.value.hint == "--allow-partial leaves these layers as they are"
    assert read_model(path, allow_partial=True).blocks == ()
    optimize(path, tmp_path / "out", RUNNER, allow_partial=True, prove=False)  # some of these graphs do not run
    assert (tmp_path / "out" / MODEL).read_bytes() == path.read_bytes()


def save_text(path, body: str, opsets: str = '["" : 20]') -> None:
    text = f"<ir_version: 10, opset_import: {opsets}> model (float[n, 4] x) => (float[n, 4] y) {{ {body} }}"
    onnx.save(onnx.parser.parse_model(text), path)


def test_a_router_whose_experts_no_reader_knows_is_refused(tmp_path):
    save_text(
        tmp_path / "loose.onnx",
        """
        w = Constant<value = float[4, 3] {0,1,2,3,4,5,6,7,8,9,10,11}>()
        table = Constant<value = float[3, 4] {0,1,2,3,4,5,6,7,8,9,10,11}>()
        k = Constant<value_ints = [1]>()
        axis = Constant<value_ints = [1]>()
        logits = MatMul(x, w)
        best, ids = TopK(logits, k)
        row = Gather(table, ids)
        flat = Squeeze(row, axis)
        y = Add(x, flat)
        """,
    )
    (layer,) = inspect_model(tmp_path / "loose.onnx").unrecognised
    assert (layer.layer, layer.node) == ("at TopK 'best'", "TopK 'best'")
    assert [str(refusal) for refusal in layer.refusals] == [
        f"{reader.FORM}: no {reader.LOOKS_FOR} follows the router (at TopK 'best')" for reader in READERS
    ]


def project_by_einsum(path) -> None:
    """Let the router of a block be an Einsum."""
    model = onnx.load(path)
    router = node_of(model.graph, "logits")
    router.op_type = "Einsum"
    del router.attribute[:]
    router.attribute.append(onnx.helper.make_attribute("equation", "th,eh->te"))
    onnx.save(model, path)


@pytest.mark.parametrize(
    "spec",
    [spec_of("dispatch", "vmoe"), spec_of("stacked"), spec_of("stacked", einsum=True)],
    ids=["dispatch", "stacked", "stacked by Einsum"],
)
def test_nothing_of_a_block_is_left_over_where_its_router_is_an_einsum(tmp_path, spec):
    """What other readers said of nodes inside belongs to the block, and stands for no layer of its own."""
    path = tmp_path / "block.onnx"
    save(spec, path)
    project_by_einsum(path)
    model = read_model(path)
    assert [block.form for block in model.blocks] == [spec.form]
    made: PruningPlan = plan(spec, THREE, model.source_sha256)
    manifest = optimize(path, tmp_path / "out", RUNNER, plan=made)
    assert [block.experts for block in manifest.blocks] == [len(THREE)]


@pytest.mark.parametrize(
    "product",
    [
        'w = Constant<value = float[4, 3] {0,1,2,3,4,5,6,7,8,9,10,11}>() logits = Einsum<equation = "th,he->te">(x, w)',
        """
        q = Constant<value = int8[4, 3] {0,1,2,3,4,5,6,7,8,9,10,11}>()
        s = Constant<value = float {0.5}>()
        w = DequantizeLinear(q, s)
        logits = MatMul(x, w)
        """,
        """
        w = Constant<value = uint8[3, 1, 8] {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,0,1,2,3,4,5,6,7}>()
        s = Constant<value = float[3] {0.5,0.5,0.5}>()
        logits = com.microsoft.MatMulNBits<K = 4, N = 3, bits = 4, block_size = 16>(x, w, s)
        """,
    ],
    ids=["Einsum", "DequantizeLinear", "MatMulNBits"],
)
def test_a_router_is_noticed_whatever_product_gives_its_logits(tmp_path, product):
    body = f"""
        {product}
        table = Constant<value = float[3, 4] {{0,1,2,3,4,5,6,7,8,9,10,11}}>()
        k = Constant<value_ints = [1]>()
        axis = Constant<value_ints = [1]>()
        best, ids = TopK(logits, k)
        row = Gather(table, ids)
        flat = Squeeze(row, axis)
        y = Add(x, flat)
    """
    save_text(tmp_path / "loose.onnx", body, '["" : 20, "com.microsoft" : 1]')
    assert [layer.node for layer in inspect_model(tmp_path / "loose.onnx").unrecognised] == ["TopK 'best'"]


def test_a_graph_without_experts_has_no_moe_layer(tmp_path):
    save_text(tmp_path / "dense.onnx", "y = Relu(x)")
    with pytest.raises(UserError) as error:
        read_model(tmp_path / "dense.onnx")
    assert error.value.what == f"{tmp_path / 'dense.onnx'} has no MoE layer"


def test_the_name_of_a_block_comes_from_its_parameters(tmp_path):
    save(Spec(), tmp_path / "block.onnx")
    assert read_model(tmp_path / "block.onnx").blocks[0].name == NAME


def test_weights_arrive_in_the_axes_of_the_record(tmp_path):
    spec = Spec(interleaved=True, biased=True)
    save(spec, tmp_path / "block.onnx")
    experts, stored = read_model(tmp_path / "block.onnx").blocks[0].experts, weights(spec)
    assert experts.gate_EHF is not None
    assert experts.up_bias_EF is not None
    np.testing.assert_array_equal(experts.gate_EHF.load(), stored["up"][:, 0::2].transpose(0, 2, 1))
    np.testing.assert_array_equal(experts.up_EHF.load(), stored["up"][:, 1::2].transpose(0, 2, 1))
    np.testing.assert_array_equal(experts.up_bias_EF.load(), stored["up_bias"][:, 1::2])
    np.testing.assert_array_equal(experts.down_EFH.take([6, 1]).load(), stored["down"][[6, 1]].transpose(0, 2, 1))
