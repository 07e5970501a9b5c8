"""Plans that keep the router full: it chooses as ever, and a token that chose a dropped expert gets nothing from it.

``compute`` says in numpy what that is; https://arxiv.org/abs/2405.16646 prunes token-choice models so.
"""

import numpy as np
import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from graph_passes.proof.mask import mask_model
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import FULL, ROWS, LayerPlan
from moe_spec.manifest import MODEL, OBSERVED, Manifest
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from tests.engines import FORMS, built
from tests.foreign.table import FOREIGN
from tests.graph_passes.block_files import ALL, ONE, THREE, assert_clean, plan, run, saved, tokens
from tests.graph_passes.block_models import FORM_NAMES, ROUTERS, Spec, compute, spec_of
from tests.graph_passes.block_models.spec import layer_name
from tests.zoo import RUNNER

BEHIND = ("dense", "sorted", "gather")


def layer(spec: Spec, index: int, keep, router: str = FULL) -> LayerPlan:
    top_k = spec.top_k if router == FULL else min(spec.top_k, len(keep))
    groups = None if router == FULL else spec.groups
    return LayerPlan(layer_name(index), spec.experts, top_k, keep, groups=groups, router=router)


def assert_computes(spec: Spec, model, *keeps, full) -> None:
    for count in (1, 5, 37):
        x = tokens(spec, count)
        assert error_between(compute(spec, x, *keeps, full=full), run(model, x)["out"])[1] <= 1e-5


# --- what it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("router", "gate", "nothing"), [(FULL, 0.0, True), (ROWS, 0.7311, False)])
def test_a_token_whose_best_expert_went_gets_nothing_or_the_next_best(tmp_path, router, gate, nothing):
    """Logits (0, 1, 2, -1), top-1, keep {0, 1}: expert 2 wins with gate .6439; without its row expert 1 with .7311."""
    spec = Spec(experts=4, top_k=1)
    source = saved(spec, tmp_path)
    model = onnx.load(source)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{layer_name(0)}.gate.weight")
    rows = np.zeros((4, spec.hidden), np.float32)
    rows[:, 0] = 0, 1, 2, -1
    weight.CopyFrom(onnx.numpy_helper.from_array(rows, weight.name))
    onnx.save(model, source)
    x = np.eye(1, spec.hidden, dtype=np.float32)
    mask_model(source, None, tmp_path / "parent")
    (before,) = gates_in(tmp_path / "parent", x)
    np.testing.assert_allclose(before, [[0, 0, 0.6439, 0]], atol=5e-5)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, (0, 1), router)))
    (after,) = gates_in(tmp_path / "out", x)
    np.testing.assert_allclose(after, [[0, gate]], atol=5e-5)
    assert run(tmp_path / "out", x)["out"].any() != nothing


def gates_in(directory, x) -> list[np.ndarray]:
    names = [block.gates for block in Manifest.load(directory).blocks]
    return [run(directory, x, OBSERVED)[name] for name in names]


@pytest.mark.parametrize("router", ["softmax", "topk_first", "sigmoid_bias", "vmoe"])
def test_tokens_that_chose_survivors_only_get_exactly_what_they_got(tmp_path, router):
    """Invariant I2: nothing is rescaled, to the last bit; without its rows a softmax would be."""
    spec = spec_of("stacked", router, capacity=None)
    source = saved(spec, tmp_path)
    for name, keep in (("parent", ALL), ("pruned", (0, 1, 2, 4, 5, 7))):
        optimize(source, tmp_path / name, RUNNER, plan=plan(source, layer(spec, 0, keep)), form="gather")
    x = tokens(spec, 200)
    (before,), (after,) = (gates_in(tmp_path / name, x) for name in ("parent", "pruned"))
    untouched = ~before[:, [3, 6]].any(axis=1)
    assert 5 < untouched.sum() < 195
    np.testing.assert_array_equal(after, before[:, [0, 1, 2, 4, 5, 7]])
    parent, pruned = (run(tmp_path / name, x)["out"] for name in ("parent", "pruned"))
    np.testing.assert_array_equal(pruned[untouched], parent[untouched])
    assert (pruned[~untouched] != parent[~untouched]).any(axis=1).all()


# --- every router and form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", BEHIND)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_leads_to_fewer_experts_in_every_form_that_can_have_them(tmp_path, router, writer):
    spec = spec_of("masked_loop", router, layers=2)
    source = saved(spec, tmp_path)
    whole = plan(source, layer(spec, 0, THREE), layer(spec, 1, ONE))
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=whole, form=writer)
    assert [(entry.experts, entry.top_k, entry.keep) for entry in manifest.blocks] == [
        (3, spec.top_k, THREE),
        (1, spec.top_k, ONE),
    ]
    assert manifest.blocks[1].router.endswith(", 1 of 8 rows lead to an expert")
    assert all(entry["agreeing"] == entry["tokens"] for entry in manifest.details["choices"])
    assert len(manifest.details["choices"]) == 6  # two layers at three shapes: their choice can still be compared
    assert_computes(spec, tmp_path / "out", THREE, ONE, full=(0, 1))
    assert_clean(tmp_path / "out")
    blocks = read_model(tmp_path / "out").blocks
    assert [(block.form, block.router.leads_to) for block in blocks] == [(writer, THREE), (writer, ONE)]
    assert not optimize(tmp_path / "out", tmp_path / "again", RUNNER, prove=False).modified


@pytest.mark.parametrize("router", ["softmax", "sigmoid_bias_groups", "switch_capacity", "llama4", "sparsemixer"])
@pytest.mark.parametrize("form", FORM_NAMES)
def test_every_form_is_pruned_in_one_layer_as_in_the_other(tmp_path, form, router):
    """One layer loses rows, the other keeps its router full."""
    if form == "qmoe":
        pytest.skip("its experts of 4 bits are written by the fused op only, in this opset")
    spec = spec_of(form, router, layers=2)
    source = saved(spec, tmp_path)
    both = plan(source, layer(spec, 0, (0, 1, 4, 5), ROWS), layer(spec, 1, THREE))
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=both)
    assert [entry.experts for entry in manifest.blocks] == [4, 3]
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert_computes(spec, tmp_path / "out", (0, 1, 4, 5), THREE, full=(1,))


SOME_FOREIGN = (
    "grouped_gpt_oss",  # whose choice is an output, which stays what it was
    "stacked_llama4",
    "masked_loop_soft",
    "nonzero_deepseek",
    "dispatch_gshard",
    "gather_indexed",
)


@pytest.mark.parametrize("name", SOME_FOREIGN)
def test_graphs_of_real_exporters_are_pruned_and_proven(zoo, tmp_path, name):
    model = read_model(zoo.foreign(name))
    layers = (LayerPlan(block.name, 8, block.router.top_k, THREE, router=FULL) for block in model.blocks)
    manifest = optimize(zoo.foreign(name), tmp_path / "out", RUNNER, plan=plan(model.path, *layers))
    assert {entry.experts for entry in manifest.blocks} == {3}
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert FOREIGN[name].layers == len(manifest.blocks)
    assert not optimize(tmp_path / "out", tmp_path / "again", RUNNER, prove=False).modified


def test_tensorrt_rtx_builds_a_full_router(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'moe-edge[tensorrt-rtx]'")
    spec = spec_of("masked_loop", "vmoe", capacity=None)
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, THREE)), accepted=FORMS)
    built(tmp_path / "out")


# --- more than once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", BEHIND)
def test_what_lost_experts_before_can_lose_more(tmp_path, form):
    """The ids of the second plan are those of the first result; what comes out is what one plan would give."""
    spec = spec_of("stacked", "softmax", biased=True)
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "once", RUNNER, plan=plan(source, layer(spec, 0, (1, 4, 5, 7))), form=form)
    further = LayerPlan(layer_name(0), 4, spec.top_k, (0, 3), router=FULL)
    second = PruningPlan(onnx_sha256(source), "by hand", (further,))
    twice = optimize(tmp_path / "once", tmp_path / "twice", RUNNER, plan=second, form=form)
    direct = optimize(source, tmp_path / "direct", RUNNER, plan=plan(source, layer(spec, 0, (1, 7))), form=form)
    assert [entry.keep for entry in twice.blocks] == [entry.keep for entry in direct.blocks] == [(1, 7)]
    assert all(entry["agreeing"] == entry["tokens"] for entry in twice.details["choices"])
    assert_computes(spec, tmp_path / "twice", (1, 7), full=(0,))
    np.testing.assert_array_equal(
        run(tmp_path / "twice", tokens(spec))["out"], run(tmp_path / "direct", tokens(spec))["out"]
    )


def test_keeping_all_changes_no_byte(tmp_path):
    spec = spec_of("stacked")
    source = saved(spec, tmp_path)
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, ALL)))
    assert not manifest.modified
    assert (tmp_path / "out" / MODEL).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("form", BEHIND)
def test_where_all_experts_are_selected_some_of_them_go(tmp_path, form):
    """Nothing is ranked: the gates are the scores of all rows."""
    spec = Spec(form="stacked", experts=4, top_k=4)
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, (0, 2))), form=form)
    assert_computes(spec, tmp_path / "out", (0, 2), full=(0,))
    assert [block.form for block in read_model(tmp_path / "out").blocks] == [form]


def test_experts_behind_a_full_router_may_be_quantised(tmp_path):
    spec = spec_of("stacked", hidden=32, width=64, opset=21)
    source = saved(spec, tmp_path)
    manifest = optimize(
        source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, THREE)), precision=Precision("int8")
    )
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert 0 < manifest.details["precision_error"] < 0.05
    assert read_model(tmp_path / "out").blocks[0].router.leads_to == THREE


def test_scores_of_rows_that_lead_nowhere_are_seen_behind_the_others(tmp_path):
    spec = spec_of("stacked")
    source = saved(spec, tmp_path)
    mask_model(source, None, tmp_path / "parent")
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, THREE)))
    x = tokens(spec)
    before, after = (
        run(directory, x, OBSERVED)[Manifest.load(directory).blocks[0].scores]
        for directory in (tmp_path / "parent", tmp_path / "out")
    )
    np.testing.assert_allclose(after, before[:, [1, 4, 5, 0, 2, 3, 6, 7]], rtol=1e-6)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(tmp_path):
    spec = spec_of("stacked")
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "pruned", RUNNER, plan=plan(source, layer(spec, 0, THREE)))
    return tmp_path / "pruned"


def refusal(source, out, *layers: LayerPlan, **options) -> tuple[str, str]:
    identity = read_model(source).source_sha256
    with pytest.raises(UserError) as error:
        optimize(source, out, RUNNER, plan=PruningPlan(identity, "by hand", layers) if layers else None, **options)
    assert not out.exists()
    return error.value.what, error.value.hint


def test_rows_of_a_full_router_cannot_go_afterwards(pruned, tmp_path):
    rows = LayerPlan(layer_name(0), 3, 2, (0, 1))
    expected = (
        "the plan removes rows of the router of layer layers.0.mlp, of which only 3 of 8 lead to an expert",
        "make the plan with `moe-edge plan --router full`, or leave this layer out of it",
    )
    assert refusal(pruned, tmp_path / "out", rows) == expected
    with pytest.raises(UserError) as error:
        mask_model(pruned, PruningPlan("", "by hand", (rows,)), tmp_path / "masked")
    assert (error.value.what, error.value.hint) == expected


def test_a_full_router_selects_as_many_as_ever(pruned, tmp_path):
    assert refusal(pruned, tmp_path / "out", LayerPlan(layer_name(0), 3, 1, (0, 1), router=FULL)) == (
        "the plan says that layer layers.0.mlp has 3 experts and K=1, the graph has 3 and K=2",
        "make a plan for this model with `moe-edge plan`; a full router selects as many as ever",
    )


def test_one_expert_behind_a_full_router_is_no_plain_ffn(pruned, tmp_path):
    last = LayerPlan(layer_name(0), 3, 2, (2,), router=FULL)
    assert refusal(pruned, tmp_path / "out", last, form="ffn") == (
        "form ffn cannot express layer layers.0.mlp: some rows of its router lead to no expert of their own",
        "use --form auto, or another form",
    )


def test_the_routing_of_a_full_router_cannot_be_forced(pruned, tmp_path):
    assert refusal(pruned, tmp_path / "out", forced=True) == (
        "the routing of layer layers.0.mlp cannot be forced: some rows of its router lead to no expert of their own",
        "leave --forced out",
    )


DAMAGE = {
    "expert_of": (
        np.array([7, 0, 1, 2, 3, 4, 5, 7]),
        "sorted: the expert ids are not the indices of a TopK",
    ),
    "expert_ids": (
        np.array([0, 1, 2, 3, 4, 5, 7, 6]),
        "sorted: tokens are passed by the expert that they are weighed for",
    ),
}
"""A table that leads to other experts than the weights say; a run of tokens that is too short."""


@pytest.mark.parametrize("constant", DAMAGE)
def test_a_file_that_loses_tokens_behind_its_router_is_refused(tmp_path, constant):
    spec = spec_of("stacked")
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, ALL[1:])), form="sorted")
    model, (values, reason) = onnx.load(tmp_path / "out" / MODEL), DAMAGE[constant]
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith(f"/{constant}"))
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(UserError) as error:
        read_model(tmp_path / "damaged.onnx")
    assert reason in error.value.what
