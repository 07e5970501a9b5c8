"""Plans that replace experts by their mean outputs: a token that chose one gets its gate times a constant.

``compute`` says in numpy what that is; MoNE, https://arxiv.org/abs/2507.00390.
"""

import dataclasses

import numpy as np
import onnx
import pytest

import graph_passes.record.prune
from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from graph_passes.proof.mask import mask_model
from graph_passes.record.prune import constants_for
from graph_passes.writers import BEHIND_A_FULL_ROUTER, WRITERS
from moe_spec.errors import UserError, VerificationError
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import FULL, REPLACE, ROWS, LayerPlan
from moe_spec.manifest import MODEL, OBSERVED, Manifest
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from tests.foreign.table import FOREIGN
from tests.graph_passes.block_files import ALL, ONE, THREE, assert_clean, run, saved, tokens
from tests.graph_passes.block_models import FORM_NAMES, ROUTERS, Spec, compute, spec_of
from tests.graph_passes.block_models.spec import layer_name
from tests.oracle import with_any_means
from tests.zoo import RUNNER


def layer(spec: Spec, index: int, keep, router: str = REPLACE) -> LayerPlan:
    made = LayerPlan(layer_name(index), spec.experts, spec.top_k, keep, router=router)
    if router != REPLACE:
        return made
    rng = np.random.default_rng([spec.seed, index])
    return dataclasses.replace(made, means_DH=rng.standard_normal((len(made.dropped), spec.hidden)).astype(np.float32))


def plan(source, *layers: LayerPlan) -> PruningPlan:
    return PruningPlan(onnx_sha256(source), "by hand", layers)


def assert_computes(spec: Spec, model, *layers: LayerPlan) -> None:
    means = [layer.mean_outputs(spec.hidden) for layer in layers]
    for count in (1, 5, 37):
        x = tokens(spec, count)
        expected = compute(spec, x, *(layer.keep for layer in layers), full=tuple(range(len(layers))), means=means)
        assert error_between(expected, run(model, x)["out"])[1] <= 1e-5


# --- what it is -----------------------------------------------------------------------------------------------------


def test_a_token_gets_its_gate_times_the_mean(tmp_path):
    """With one expert a token, who chose a replaced one gets nothing but that."""
    spec = Spec(experts=4, top_k=1)
    source, planned = saved(spec, tmp_path), layer(spec, 0, (0, 1))
    mask_model(source, None, tmp_path / "parent")
    (gates,) = (Manifest.load(tmp_path / "parent").blocks[0].gates,)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, planned))
    x = tokens(spec)
    before_TE = run(tmp_path / "parent", x, OBSERVED)[gates]
    replaced = before_TE[:, 2:].any(axis=1)
    assert 5 < replaced.sum() < 32
    got, parent = run(tmp_path / "out", x)["out"], run(tmp_path / "parent", x)["out"]
    np.testing.assert_allclose(got[replaced], (before_TE[:, 2:] @ planned.means_DH)[replaced], rtol=1e-5)
    np.testing.assert_array_equal(got[~replaced], parent[~replaced])


# --- every router and form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", BEHIND_A_FULL_ROUTER)
@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"llama4"}))
def test_every_router_leads_to_constants_in_every_form_that_can_have_them(tmp_path, router, writer):
    spec = spec_of("masked_loop", router)
    source, planned = saved(spec, tmp_path), layer(spec, 0, THREE)
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(source, planned), form=writer)
    assert [(entry.experts, entry.top_k, entry.keep) for entry in manifest.blocks] == [(3, spec.top_k, THREE)]
    assert all(entry["agreeing"] == entry["tokens"] for entry in manifest.details["choices"])
    assert_computes(spec, tmp_path / "out", planned)
    assert_clean(tmp_path / "out")
    assert not optimize(tmp_path / "out", tmp_path / "again", RUNNER, prove=False).modified


@pytest.mark.parametrize("form", FORM_NAMES)
def test_every_form_is_replaced_in_one_layer_and_silenced_in_the_other(tmp_path, form):
    if form == "qmoe":
        pytest.skip("its experts of 4 bits are written by the fused op only, in this opset")
    spec = spec_of(form, "softmax", layers=2)
    source = saved(spec, tmp_path)
    layers = layer(spec, 0, ONE), layer(spec, 1, THREE, FULL)
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(source, *layers))
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    nothing = dataclasses.replace(layers[1], router=REPLACE, means_DH=np.zeros((5, spec.hidden), np.float32))
    assert_computes(spec, tmp_path / "out", layers[0], nothing)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_constants_have_the_dtype_of_the_experts(tmp_path, dtype):
    spec = spec_of("stacked", "softmax", dtype=dtype)
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, THREE)))
    (constants,) = (
        tensor
        for tensor in onnx.load(tmp_path / "out" / MODEL).graph.initializer
        if "constants" in tensor.name and tensor.name.endswith("outputs")
    )
    assert onnx.helper.tensor_dtype_to_np_dtype(constants.data_type).name == dtype
    assert list(constants.dims) == [5, spec.hidden]


@pytest.mark.parametrize("name", ["masked_loop_soft", "dispatch_gshard", "gather_indexed"])
def test_graphs_of_real_exporters_are_replaced_and_proven(zoo, tmp_path, name):
    model = read_model(zoo.foreign(name))
    layers = (
        with_any_means(
            LayerPlan(block.name, 8, block.router.top_k, THREE, router=FULL), block.experts.down_EFH.shape[2]
        )
        for block in model.blocks
    )
    manifest = optimize(zoo.foreign(name), tmp_path / "out", RUNNER, plan=plan(model.path, *layers))
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert FOREIGN[name].layers == len(manifest.blocks)
    assert not optimize(tmp_path / "out", tmp_path / "again", RUNNER, prove=False).modified


def test_experts_beside_constants_may_be_quantised(tmp_path):
    spec = spec_of("stacked", hidden=32, width=64, opset=21)
    source = saved(spec, tmp_path)
    planned = plan(source, layer(spec, 0, THREE))
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=planned, precision=Precision("int8"))
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert 0 < manifest.details["precision_error"] < 0.05


def test_where_all_experts_are_selected_some_of_them_are_constant(tmp_path):
    spec = Spec(form="stacked", experts=4, top_k=4)
    source, planned = saved(spec, tmp_path), layer(spec, 0, (0, 2))
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, planned))
    assert_computes(spec, tmp_path / "out", planned)


# --- more than once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [FULL, REPLACE])
@pytest.mark.parametrize("form", BEHIND_A_FULL_ROUTER)
def test_what_was_replaced_stays_so_when_more_experts_go(tmp_path, form, router):
    spec = spec_of("stacked", "softmax")
    source, first = saved(spec, tmp_path), layer(spec, 0, (1, 4, 5, 7))
    optimize(source, tmp_path / "once", RUNNER, plan=plan(source, first))
    further = LayerPlan(layer_name(0), 4, spec.top_k, (0, 3), router=FULL)
    further = with_any_means(further, spec.hidden) if router == REPLACE else further
    second = PruningPlan(onnx_sha256(source), "by hand", (further,))
    optimize(tmp_path / "once", tmp_path / "twice", RUNNER, plan=second, form=form)
    means = np.zeros((6, spec.hidden), np.float32)
    means[[0, 1, 2, 5]] = first.means_DH  # of experts 0, 2, 3 and 6; 4 and 5 went later
    if router == REPLACE:
        means[[3, 4]] = further.means_DH
    both = dataclasses.replace(first, keep=(1, 7), means_DH=means)
    assert_computes(spec, tmp_path / "twice", both)


def test_keeping_all_changes_no_byte(tmp_path):
    spec = spec_of("stacked")
    source = saved(spec, tmp_path)
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, ALL)))
    assert not manifest.modified
    assert (tmp_path / "out" / MODEL).read_bytes() == source.read_bytes()


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(source, out, *layers: LayerPlan, **options) -> tuple[str, str]:
    with pytest.raises(UserError) as error:
        optimize(source, out, RUNNER, plan=plan(source, *layers), **options)
    assert not out.exists()
    return error.value.what, error.value.hint


@pytest.mark.parametrize("form", [form for form in WRITERS if form not in BEHIND_A_FULL_ROUTER])
def test_forms_that_route_by_themselves_or_not_at_all_are_refused(tmp_path, form):
    spec = spec_of("stacked")
    assert refusal(saved(spec, tmp_path), tmp_path / "out", layer(spec, 0, ONE), form=form) == (
        f"form {form} cannot express layer layers.0.mlp: some rows of its router lead to no expert of their own",
        "use --form auto, or another form",
    )


def test_means_of_another_width_are_refused(tmp_path):
    spec = spec_of("stacked")
    planned = with_any_means(layer(spec, 0, THREE, FULL), spec.hidden + 1)
    assert refusal(saved(spec, tmp_path), tmp_path / "out", planned) == (
        f"the plan has mean outputs of {spec.hidden + 1} channels for layer layers.0.mlp, whose experts give "
        f"{spec.hidden}",
        "make a plan for this model with `moe-edge plan`",
    )


def test_experts_that_read_gated_tokens_are_refused(tmp_path):
    """Their gate is inside: f(g x) is no g times a constant."""
    spec = spec_of("stacked", "llama4")
    source, planned = saved(spec, tmp_path), layer(spec, 0, THREE)
    expected = (
        "the router of layer layers.0.mlp weighs what experts read, so that none can be replaced by a constant times "
        "its gate",
        "plan with --router full or rows",
    )
    assert refusal(source, tmp_path / "out", planned) == expected
    with pytest.raises(UserError) as error:
        mask_model(source, plan(source, planned), tmp_path / "masked")
    assert (error.value.what, error.value.hint) == expected


def test_rows_cannot_go_afterwards(tmp_path):
    spec = spec_of("stacked")
    source = saved(spec, tmp_path)
    optimize(source, tmp_path / "replaced", RUNNER, plan=plan(source, layer(spec, 0, THREE)))
    rows = PruningPlan(onnx_sha256(source), "by hand", (LayerPlan(layer_name(0), 3, 2, (0, 1), router=ROWS),))
    with pytest.raises(UserError, match="the plan removes rows of the router of layer layers"):
        optimize(tmp_path / "replaced", tmp_path / "out", RUNNER, plan=rows)


def test_a_constant_that_is_not_the_mean_is_found(tmp_path, monkeypatch):
    spec = spec_of("stacked")
    source = saved(spec, tmp_path)

    def swapped(block, planned):
        constants = constants_for(block, planned)
        return dataclasses.replace(constants, outputs_DH=constants.outputs_DH.take((1, 0, 2, 3, 4)))

    monkeypatch.setattr(graph_passes.record.prune, "constants_for", swapped)
    with pytest.raises(VerificationError, match="with the dropped experts unselectable"):
        optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(spec, 0, THREE)))
