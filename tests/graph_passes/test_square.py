"""The square that must close: torch, export, and the optimised graph in every form agree, whatever is kept.

The reference is the unpruned torch model with the dropped experts' logits at -inf; their gates at 0, or times a
constant, where the router stays as it is.
"""

import functools

import numpy as np
import pytest
import torch

from exporter.tasks import task_of
from exporter.trace import run_torch
from graph_passes.optimize import optimize
from graph_passes.proof.mask import mask_model
from models.checkpoints import load_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import FULL, REPLACE, ROWS, UNTOUCHED, LayerPlan
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from tests.engines import built
from tests.models_table import TINY
from tests.oracle import masked, with_any_means
from tests.zoo import RUNNER, Zoo

ALL = tuple(range(8))
KEEPS = {"3 of 8": (0, 1, 5), "1 of 8": (5,), "all": ALL}
FORMS = ("dense", "sorted", "gather", "ffn")
SHAPES = ((1, 1), (3, 7), (2, 12))
TOLERANCE = 1e-5

every_model = pytest.mark.parametrize("name", sorted(TINY))
every_keep = pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS.keys())


def plan_of(zoo: Zoo, name: str, keep: tuple[int, ...], router: str = ROWS) -> PruningPlan:
    checkpoint = zoo.checkpoint(name)
    layers = [
        LayerPlan(
            layer.name,
            layer.num_experts,
            layer.top_k if router in UNTOUCHED else min(layer.top_k, len(keep)),
            keep,
            groups=layer.groups,
            router=router,
        )
        for layer in find_moe_layers(load_model(checkpoint))
    ]
    if router == REPLACE:
        layers = [with_any_means(layer, TINY[name]().config.hidden_size) for layer in layers]
    return PruningPlan(checkpoint_sha256(checkpoint), "by hand", tuple(layers))


@functools.cache
def expected(zoo: Zoo, name: str, keep: tuple[int, ...], router: str = ROWS):
    """Inputs at every shape, and what torch gives for them with the dropped experts masked."""
    model = load_model(zoo.checkpoint(name))
    task = task_of(type(model).__name__)
    rng = np.random.default_rng(3)
    batches = [task.example(model.config, batch, sequence, rng) for batch, sequence in SHAPES]
    with torch.no_grad(), masked(model, plan_of(zoo, name, keep, router)):
        return batches, [run_torch(model, task, feeds) for feeds in batches]


def assert_same(zoo: Zoo, name: str, keep: tuple[int, ...], model, router: str = ROWS) -> None:
    batches, wanted = expected(zoo, name, keep, router)
    for got, reference in zip(RUNNER.run(model, batches), wanted, strict=True):
        for output, value in reference.items():
            assert error_between(value, got[output])[1] <= TOLERANCE


@every_model
@every_keep
def test_the_masked_export_equals_masked_torch(zoo, tmp_path, name, keep):
    mask_model(zoo.exported(name), plan_of(zoo, name, keep), tmp_path / "masked")
    assert_same(zoo, name, keep, tmp_path / "masked" / MODEL)


@every_model
@every_keep
@pytest.mark.parametrize("form", FORMS)
def test_the_optimised_graph_equals_masked_torch(zoo, tmp_path, name, keep, form):
    out, plan = tmp_path / "optimized", plan_of(zoo, name, keep)
    if form == "ffn" and len(keep) > 1:
        with pytest.raises(UserError, match=f"it has {len(keep)} experts, a plain FFN is one"):
            optimize(zoo.exported(name), out, RUNNER, plan=plan, form=form)
        return
    manifest = optimize(zoo.exported(name), out, RUNNER, plan=plan, form=form)
    assert {(block.form, block.experts, block.keep) for block in manifest.blocks} == {(form, len(keep), keep)}
    assert_same(zoo, name, keep, out / MODEL)


@every_model
@every_keep
def test_a_foreign_export_is_pruned_to_the_same_numbers(zoo, tmp_path, name, keep):
    source, plan = zoo.batched_mm(name), plan_of(zoo, name, keep)
    with pytest.raises(UserError, match="the plan was made for model"):
        optimize(source, tmp_path / "refused", RUNNER, plan=plan)
    optimize(source, tmp_path / "optimized", RUNNER, plan=plan, any_model=True)
    assert_same(zoo, name, keep, tmp_path / "optimized" / MODEL)


@pytest.mark.parametrize("form", ["dense", "sorted", "gather"])
@pytest.mark.parametrize("keep", [(0, 1, 5), (5,)], ids=["3 of 8", "1 of 8"])
@pytest.mark.parametrize("name", ["olmoe", "vmoe"])
@pytest.mark.parametrize("router", [FULL, REPLACE])
def test_the_square_closes_where_the_router_stays_as_it_is(zoo, tmp_path, router, name, keep, form):
    plan = plan_of(zoo, name, keep, router)
    manifest = optimize(zoo.exported(name), tmp_path / "optimized", RUNNER, plan=plan, form=form)
    assert {(block.form, block.experts, block.keep) for block in manifest.blocks} == {(form, len(keep), keep)}
    assert_same(zoo, name, keep, tmp_path / "optimized" / MODEL, router)


@every_model
def test_tensorrt_rtx_builds_the_dense_form(zoo, tmp_path, name):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'moe-edge[tensorrt-rtx]'")
    plan = plan_of(zoo, name, KEEPS["3 of 8"])
    optimize(zoo.exported(name), tmp_path / "dense", RUNNER, plan=plan, form="dense", prove=False)
    built(tmp_path / "dense")
