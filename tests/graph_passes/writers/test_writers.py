"""What each form looks like, and which form is chosen."""

import math

import onnx
import pytest

from graph_passes.optimize import optimize
from moe_spec.errors import UserError
from moe_spec.feasibility import Groups
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL
from tests.graph_passes.block_models import Spec, plan, save
from tests.zoo import RUNNER

ROUTING_OPS = {"TopK", "Softmax", "Sigmoid", "GatherElements", "ScatterElements"}


def written(tmp_path, spec: Spec, keep: tuple[int, ...], form: str = "auto", **options):
    """(manifest, model) of the block of ``spec`` optimised to ``keep``."""
    source = tmp_path / "block.onnx"
    save(spec, source)
    made = plan(spec, keep, onnx_sha256(source))
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=made, form=form, **options)
    return manifest, onnx.load(tmp_path / "out" / MODEL)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("form", ["dense", "sorted", "gather", "ffn"])
def test_one_expert_needs_no_ranking(tmp_path, form):
    _, model = written(tmp_path, Spec(), (3,), form)
    sorts = 2 if form == "sorted" else 0  # argsort of the slots and its inverse; the router ranks nothing
    assert ops(model).count("TopK") == sorts


def test_one_expert_with_gate_1_is_a_plain_ffn(tmp_path):
    manifest, model = written(tmp_path, Spec(), (3,))
    assert ops(model) == ["MatMul", "MatMul", "Sigmoid", "Mul", "Mul", "MatMul"]
    assert {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer} == {
        "layers.0.mlp/experts.gate": (8, 12),
        "layers.0.mlp/experts.up": (8, 12),
        "layers.0.mlp/experts.down": (12, 8),
    }
    block = manifest.blocks[0]
    assert (block.form, block.router, block.gates, block.keep) == ("ffn", "", None, (3,))


def test_a_sigmoid_gate_is_not_1_and_keeps_its_router(tmp_path):
    manifest, model = written(tmp_path, Spec(score="sigmoid"), (3,))
    assert manifest.blocks[0].form == "dense"
    assert "TopK" not in ops(model)
    with pytest.raises(UserError) as error:
        optimize(tmp_path / "block.onnx", tmp_path / "ffn", RUNNER, form="ffn")
    assert error.value.what == ("form ffn cannot express layer layers.0.mlp: it has 8 experts, a plain FFN is one")


def test_a_gate_that_is_not_1_cannot_become_a_plain_ffn(tmp_path):
    with pytest.raises(UserError) as error:
        written(tmp_path, Spec(score="sigmoid"), (3,), "ffn")
    assert error.value.what == (
        "form ffn cannot express layer layers.0.mlp: the gate of a sigmoid, top-k router with one expert is not 1"
    )


def test_as_many_experts_as_are_selected_need_no_topk(tmp_path):
    _, model = written(tmp_path, Spec(), (1, 6), "dense")
    assert "TopK" not in ops(model)


def test_groups_vanish_where_nothing_is_ranked(tmp_path):
    _, model = written(tmp_path, Spec(score="sigmoid", groups=Groups(2, 1)), (1, 2), "dense")
    assert "TopK" not in ops(model)


@pytest.mark.parametrize(
    ("keep", "accepted", "form"),
    [
        ((3,), ("dense", "ffn"), "ffn"),
        ((3,), ("dense",), "dense"),
        ((2, 3), ("dense", "sorted", "gather", "ffn"), "dense"),
        ((2, 3, 4), ("dense", "sorted", "gather", "ffn"), "sorted"),
        ((0, 1, 2, 3, 4), ("dense", "gather", "ffn"), "dense"),
        ((0, 1, 2, 3, 4), ("gather",), "gather"),
    ],
)
def test_auto_chooses_by_experts_k_and_what_the_target_takes(tmp_path, keep, accepted, form):
    manifest, _ = written(tmp_path, Spec(), keep, accepted=accepted)
    assert manifest.blocks[0].form == form


@pytest.mark.parametrize("form", ["dense", "sorted", "gather"])
def test_no_weight_of_a_dropped_expert_is_left(tmp_path, form):
    keep = (1, 4, 6)
    manifest, model = written(tmp_path, Spec(), keep, form)
    sizes = [math.prod(tensor.dims) for tensor in model.graph.initializer]
    large = sum(size for size in sizes if size > 16)
    assert large == len(keep) * (8 + 3 * 8 * 12)  # router row and three projections an expert
    assert not model.functions
    used = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used
    assert manifest.blocks[0].bytes == 4 * large


def test_the_routers_scale_is_folded_into_the_plain_ffn(tmp_path):
    _, model = written(tmp_path, Spec(scale=2.5, biased=True), (3,))
    assert ops(model).count("Mul") == 2  # silu and gate; no third for the scale


CPU, RTX = ("dense", "sorted", "gather", "ffn", "moe", "qmoe"), ("dense", "gather", "ffn")


@pytest.mark.parametrize(
    ("keep", "tokens", "accepted", "form"),
    [
        ((3,), None, CPU, "ffn"),
        ((1, 3), None, CPU, "dense"),
        ((1, 3, 5), None, CPU, "sorted"),
        ((1, 3, 5), 1, CPU, "moe"),
        ((1, 3, 5), 16, CPU, "sorted"),
        ((1, 3, 5), 1, RTX, "dense"),
    ],
)
def test_auto_goes_by_what_is_left_the_tokens_of_a_run_and_the_target(tmp_path, keep, tokens, accepted, form):
    manifest, _ = written(tmp_path, Spec(renormalize=True), keep, tokens=tokens, accepted=accepted)
    assert manifest.blocks[0].form == form


def test_a_target_that_takes_nothing_that_fits_is_refused(tmp_path):
    with pytest.raises(UserError) as error:
        written(tmp_path, Spec(score="sigmoid"), (1, 3, 5), accepted=["ffn"])
    assert error.value.what == (
        "no form that the target takes can express layer layers.0.mlp (ffn: it has 3 experts, a plain FFN is one)"
    )
    assert error.value.hint == "choose another --target, or a --form"
