"""Merged experts behind a router that stays as it is: rows of a group share one expert, and their gates add up.

The reference is the graph as it was, in which the experts of a group are equal already: nothing may change. Where they
are not, they are merged first: `test_merged`.
"""

import dataclasses

import numpy as np
import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.proof.mask import mask_model
from graph_passes.writers import BEHIND_A_FULL_ROUTER, WRITERS
from moe_spec.errors import UserError
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import ALIAS, FULL, LayerPlan, Merge
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from tests.graph_passes.block_files import assert_clean, run, saved, tokens
from tests.graph_passes.block_models import ROUTERS, Spec, spec_of
from tests.graph_passes.block_models.spec import layer_name
from tests.oracle import with_any_means
from tests.zoo import RUNNER

GROUPS = {1: (1, 6), 4: (2, 3, 4), 5: (0, 5), 7: (7,)}
"""By survivor; their first rows are in another order."""

EXPERT_OF = (2, 0, 1, 1, 1, 2, 0, 3)
"""For each of the 8 rows of the router."""


def layer(**changed) -> LayerPlan:
    merge = tuple(Merge(group, (1.0,) * len(group)) for group in GROUPS.values())
    return dataclasses.replace(LayerPlan(layer_name(0), 8, 2, tuple(GROUPS), router=ALIAS, merge=merge), **changed)


def plan(source, planned: LayerPlan) -> PruningPlan:
    return PruningPlan(onnx_sha256(source), "by hand", (planned,))


def with_equals(spec: Spec, folder):
    """A model whose experts of a group are equal."""
    source = saved(spec, folder)
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if ".experts." in tensor.name and list(tensor.dims)[:1] == [8]:
            values = onnx.numpy_helper.to_array(tensor)[[tuple(GROUPS)[expert] for expert in EXPERT_OF]]
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    onnx.save(model, source)
    return source


@pytest.mark.parametrize("writer", BEHIND_A_FULL_ROUTER)
@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_leads_to_shared_experts_in_every_form_that_can_have_them(tmp_path, router, writer):
    spec = spec_of("stacked", router, biased=router in ("softmax", "vmoe"))
    source = with_equals(spec, tmp_path)
    planned = layer(top_k=spec.top_k)
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan(source, planned), form=writer)
    assert [(entry.experts, entry.top_k, entry.keep) for entry in manifest.blocks] == [(4, spec.top_k, tuple(GROUPS))]
    assert manifest.blocks[0].router.endswith(", 8 of 8 rows lead to one of 4 experts")
    assert all(entry["agreeing"] == entry["tokens"] for entry in manifest.details["choices"])
    assert len(manifest.details["choices"]) == 3
    for count in (1, 5, 37):
        x = tokens(spec, count)
        assert error_between(run(source, x)["out"], run(tmp_path / "out", x)["out"])[1] <= 1e-5
    assert_clean(tmp_path / "out")
    (block,) = read_model(tmp_path / "out").blocks
    assert (block.form, block.router.expert_of) == (writer, EXPERT_OF)
    assert not optimize(tmp_path / "out", tmp_path / "again", RUNNER, prove=False).modified


@pytest.mark.parametrize("form", BEHIND_A_FULL_ROUTER)
def test_where_all_experts_are_selected_gates_add_up_too(tmp_path, form):
    spec = Spec(form="stacked", experts=8, top_k=8)
    source = with_equals(spec, tmp_path)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer(top_k=8)), form=form)
    x = tokens(spec)
    assert error_between(run(source, x)["out"], run(tmp_path / "out", x)["out"])[1] <= 1e-5
    assert [block.num_experts for block in read_model(tmp_path / "out").blocks] == [4]


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("form", BEHIND_A_FULL_ROUTER)
def test_a_shared_expert_goes_for_all_of_its_rows(tmp_path, form, replaces):
    spec = spec_of("stacked", "softmax")
    source = with_equals(spec, tmp_path)
    optimize(source, tmp_path / "shared", RUNNER, plan=plan(source, layer()), form="sorted")
    further = LayerPlan(layer_name(0), 4, 2, (0, 3), router=FULL)
    of_rows = LayerPlan(layer_name(0), 8, 2, (1, 6, 7), router=FULL)
    if replaces:
        further = with_any_means(further, spec.hidden)
        means = further.mean_outputs(spec.hidden)[[EXPERT_OF[row] - 1 for row in of_rows.dropped]]
        of_rows = dataclasses.replace(with_any_means(of_rows, spec.hidden), means_DH=means)
    second = PruningPlan(onnx_sha256(source), "by hand", (further,))
    optimize(tmp_path / "shared", tmp_path / "twice", RUNNER, plan=second, form=form)
    mask_model(source, plan(source, of_rows), tmp_path / "masked")
    x = tokens(spec)
    assert error_between(run(tmp_path / "masked", x)["out"], run(tmp_path / "twice", x)["out"])[1] <= 1e-5


def refusal(source, out, planned: LayerPlan, **options) -> tuple[str, str]:
    with pytest.raises(UserError) as error:
        optimize(source, out, RUNNER, plan=plan(source, planned), **options)
    assert not out.exists()
    return error.value.what, error.value.hint


@pytest.mark.parametrize("form", [form for form in WRITERS if form not in BEHIND_A_FULL_ROUTER])
def test_forms_that_route_by_themselves_or_not_at_all_are_refused(tmp_path, form):
    source = with_equals(spec_of("stacked"), tmp_path)
    assert refusal(source, tmp_path / "out", layer(), form=form) == (
        f"form {form} cannot express layer layers.0.mlp: some rows of its router lead to no expert of their own",
        "use --form auto, or another form",
    )


def test_rows_cannot_be_shared_twice(tmp_path):
    source = with_equals(spec_of("stacked"), tmp_path)
    optimize(source, tmp_path / "shared", RUNNER, plan=plan(source, layer()))
    again = LayerPlan(layer_name(0), 4, 2, (0,), router=ALIAS, merge=(Merge((0, 1, 2, 3), (1, 1, 1, 1)),))
    with pytest.raises(UserError) as error:
        optimize(tmp_path / "shared", tmp_path / "out", RUNNER, plan=plan(source, again))
    assert error.value.what == (
        "the plan says that layer layers.0.mlp has 4 experts, K=2 and as many rows, the graph has 4, K=2 and 8 rows"
    )


def test_a_table_that_leads_elsewhere_is_found(tmp_path):
    source = with_equals(spec_of("stacked"), tmp_path)
    optimize(source, tmp_path / "out", RUNNER, plan=plan(source, layer()), form="sorted")
    model = onnx.load(tmp_path / "out" / MODEL)
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("/expert_of"))
    table.CopyFrom(onnx.numpy_helper.from_array(np.array([2, 0, 1, 1, 1, 2, 0, 9]), table.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(UserError, match="sorted: the expert ids are not the indices of a TopK"):
        read_model(tmp_path / "damaged.onnx")
