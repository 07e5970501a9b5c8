"""Training behind full routers: what a plan drops gives nothing and learns nothing, and goes from the graph."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from exporter.export import export
from graph_passes.optimize import optimize
from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import FULL, ROWS
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from pruning.finetuning.finetune import RECORD, finetune
from pruning.finetuning.full_router import silenced
from pruning.finetuning.objectives import task_loss
from pruning.finetuning.options import FullRouter
from pruning.finetuning.recipe import RECIPES
from pruning.finetuning.training import train
from tests.models_table import EXPERTS, TINY, example_inputs, vmoe_expert_choice
from tests.oracle import masked, plan_for
from tests.pruning.finetuning.examples import columns, quick, saved
from tests.zoo import RUNNER

KEPT = (1, 4, 6)


def full_plan(model, router=FULL):
    return plan_for(model, {layer.name: KEPT for layer in find_moe_layers(model)}, router=router)


def saved_plan(checkpoint, path, router=FULL):
    layers = full_plan(load_model(checkpoint), router).layers
    PruningPlan(checkpoint_sha256(checkpoint), "by hand", layers).save(path)
    return path


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_loss_is_that_of_the_model_whose_dropped_experts_give_nothing(name):
    model, data = TINY[name](), columns(TINY[name](), 8)
    with torch.no_grad(), masked(model, full_plan(model)):
        expected = task_loss(model, data).item()
    before = [
        parameter.detach().clone() for layer in find_moe_layers(model) for parameter in layer.experts.parameters()
    ]
    with silenced(model, full_plan(model)):
        losses = train(model, data, task_loss, quick(8))
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]
    after = [parameter for layer in find_moe_layers(model) for parameter in layer.experts.parameters()]
    for old_E, new_E in zip(before, after, strict=True):
        moved = [not torch.equal(old, new) for old, new in zip(old_E, new_E, strict=True)]
        assert not any(moved[expert] for expert in range(EXPERTS) if expert not in KEPT)
    with torch.no_grad():
        assert task_loss(model, data).item() != pytest.approx(losses[-1], abs=1e-3)  # they give something again


def test_a_recovered_checkpoint_loses_them_in_its_graph(tmp_path):
    checkpoint, data = saved("vmoe", tmp_path)
    method = FullRouter(saved_plan(checkpoint, tmp_path / "full.json"))
    done = finetune(checkpoint, data, method, quick(4), tmp_path / "recovered")
    record: Any = json.loads((tmp_path / "recovered" / RECORD).read_text())
    assert (record["method"], record["options"]) == ("full-router", {})
    plan = PruningPlan.load(tmp_path / "recovered" / "plan.json")
    assert plan.model_sha256 == checkpoint_sha256(tmp_path / "recovered") != done.model_sha256
    assert done.plan is not None
    assert plan.layers == done.plan.layers
    export(tmp_path / "recovered", tmp_path / "exported", RUNNER)
    manifest = optimize(tmp_path / "exported", tmp_path / "small", RUNNER, plan=plan)
    assert [block.keep for block in manifest.blocks] == [KEPT, KEPT]
    model = load_model(tmp_path / "recovered")
    inputs = example_inputs(model, 3, 0, seed=5)
    (found,) = RUNNER.run(tmp_path / "small" / MODEL, [{"pixel_values": inputs["pixel_values"].numpy()}])
    with torch.no_grad(), masked(model, plan):
        np.testing.assert_allclose(found["logits"], model(**inputs).logits, rtol=0, atol=1e-5)


def refusal(checkpoint, plan, data, out):
    with pytest.raises(UserError) as caught:
        finetune(checkpoint, data, FullRouter(plan), RECIPES["router-norm-cifar"], out)
    assert not out.exists()
    return caught.value.what, caught.value.hint


def test_a_plan_that_removes_rows_is_refused_before_data_is_read(tmp_path):
    checkpoint, _ = saved("vmoe", tmp_path)
    plan = saved_plan(checkpoint, tmp_path / "rows.json", ROWS)
    assert refusal(checkpoint, plan, tmp_path / "none.npz", tmp_path / "out") == (
        f"{plan} has the router 'rows' in layer layers.1.mlp, behind which nothing is trained, expected 'full'",
        "plan with --router full; what --router rows leaves is a checkpoint: moe-edge prune CHECKPOINT "
        f"--plan {plan} -o pruned, and moe-edge finetune pruned",
    )


def test_the_plan_of_another_model_is_refused(tmp_path):
    checkpoint, data = saved("vmoe", tmp_path)
    plan = PruningPlan("0" * 64, "by hand", full_plan(load_model(checkpoint)).layers)
    plan.save(tmp_path / "other.json")
    what, _ = refusal(checkpoint, tmp_path / "other.json", data, tmp_path / "out")
    identity = checkpoint_sha256(checkpoint)[:12]
    assert what == f"the plan was made for model {'0' * 12}, but {checkpoint} is model {identity}"


def test_experts_that_choose_are_refused(tmp_path):
    save_model(vmoe_expert_choice(), tmp_path / "checkpoint")
    what, _ = refusal(tmp_path / "checkpoint", tmp_path / "none.json", tmp_path / "none.npz", tmp_path / "out")
    assert what.startswith("in layer layers.0.mlp experts choose their tokens")
