"""From checkpoint to checkpoint, and on to a graph."""

import json
import shutil
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.export import export
from graph_passes.optimize import optimize
from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from models.tensor_files import read_tensors
from models.vmoe.assets import fashion_mnist
from models.vmoe.evaluate import evaluate
from moe_spec.dataset import load_dataset
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from pruning.calibrate import calibrate
from pruning.finetuning.finetune import RECORD, finetune
from pruning.finetuning.options import Plain, RouterKD, Seer, TaskSpecific
from pruning.options import PlanOptions
from pruning.plan import plan
from pruning.prune import prune
from tests.families.configs import tiny
from tests.models_table import EXPERTS, HIDDEN, TINY
from tests.oracle import plan_for
from tests.pruning.finetuning.examples import quick, saved
from tests.zoo import RUNNER


def weights(checkpoint):
    return torch.cat([parameter.detach().flatten() for parameter in load_model(checkpoint).parameters()])


def test_a_pruned_checkpoint_recovers(tmp_path):
    checkpoint, data = saved("vmoe", tmp_path)
    (checkpoint / "LICENSE").write_text("goes along")
    model = load_model(checkpoint)
    layers = plan_for(model, {layer.name: (1, 2, 5) for layer in find_moe_layers(model)}).layers
    PruningPlan(checkpoint_sha256(checkpoint), "by hand", layers).save(tmp_path / "plan.json")
    pruned = prune(checkpoint, tmp_path / "plan.json", tmp_path / "pruned")
    done = finetune(pruned, data, Plain(), quick(40), tmp_path / "recovered")
    first, last = done.first_and_last_loss()
    assert last < 0.6 * first
    assert [layer.num_experts for layer in find_moe_layers(load_model(tmp_path / "recovered"))] == [3, 3]
    record = json.loads((tmp_path / "recovered" / RECORD).read_text())
    assert record == {
        "artifact": "finetuning",
        "schema": 1,
        "model_sha256": checkpoint_sha256(pruned),
        "data_sha256": done.data_sha256,
        "method": "plain",
        "options": {},
        "recipe": record["recipe"],
        "losses": list(done.losses),
        "drops": [],
        "teacher_sha256": None,
    }
    assert record["recipe"]["steps"] == len(done.losses) == 40
    assert {path.name for path in (tmp_path / "recovered").iterdir()} == {
        "config.json",
        "model.safetensors",
        "LICENSE",
        RECORD,
    }


def test_the_embedded_model_recovers_what_pruning_cost(tmp_path):
    checkpoint = fashion_mnist()
    calibrate(checkpoint, checkpoint / "calibration.npz", tmp_path / "statistics.safetensors", limit=300)
    plan(tmp_path / "statistics.safetensors", PlanOptions(2, "gate-mass"), tmp_path / "plan.json")
    pruned = prune(checkpoint, tmp_path / "plan.json", tmp_path / "pruned")
    recipe = quick(30, learning_rate=1e-3, batch_size=32)
    finetune(pruned, checkpoint / "calibration.npz", Plain(), recipe, tmp_path / "recovered")
    test = load_dataset(checkpoint / "test.npz", checkpoint).first(500)
    images, labels = torch.from_numpy(test.feeds["pixel_values"]), torch.from_numpy(test.labels)
    models: list[Any] = [load_model(one) for one in (pruned, tmp_path / "recovered")]
    before, after = (evaluate(model, images, labels).accuracy for model in models)
    assert before < 0.75
    assert after > 0.85


def test_the_same_seed_writes_the_same_weights(tmp_path):
    checkpoint, data = saved("mixtral", tmp_path)
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for out, seed in ((first, 1), (again, 1), (other, 2)):
        finetune(checkpoint, data, Plain(), quick(3, seed=seed), out)
    assert checkpoint_sha256(first) == checkpoint_sha256(again) != checkpoint_sha256(other)
    assert not torch.equal(weights(first), weights(checkpoint))


def test_one_expert_a_layer_becomes_a_plain_network(tmp_path):
    checkpoint, data = saved("vmoe", tmp_path)
    done = finetune(checkpoint, data, TaskSpecific(windows=2), quick(8), tmp_path / "one")
    assert PruningPlan.load(tmp_path / "one" / "plan.json") == done.plan
    assert done.plan.model_sha256 == checkpoint_sha256(checkpoint)
    assert [layer.num_experts for layer in find_moe_layers(load_model(tmp_path / "one"))] == [1, 1]
    export(tmp_path / "one", tmp_path / "exported", RUNNER)
    manifest = optimize(tmp_path / "exported", tmp_path / "optimized", RUNNER, form="ffn")
    assert [block.form for block in manifest.blocks] == ["ffn", "ffn"]
    graph = onnx.load(tmp_path / "optimized" / MODEL, load_external_data=False).graph
    assert not {node.op_type for node in graph.node} & {"TopK", "GatherElements", "ScatterElements", "ArgMax"}
    routers = {(1, HIDDEN), (HIDDEN, 1)}
    assert not [tensor.name for tensor in graph.initializer if tuple(tensor.dims) in routers]


def test_two_passes_start_again_from_the_checkpoint(tmp_path):
    checkpoint, data = saved("vmoe", tmp_path)
    options = TaskSpecific(variant="two-pass")
    done = finetune(checkpoint, data, options, quick(6), tmp_path / "one")
    assert len(done.losses) == 12
    assert done.plan is not None
    done.plan.save(tmp_path / "plan.json")
    pruned = prune(checkpoint, tmp_path / "plan.json", tmp_path / "pruned")
    second = finetune(pruned, data, Plain(), quick(6), tmp_path / "second")
    assert second.losses == done.losses[6:]
    assert torch.equal(weights(tmp_path / "second"), weights(tmp_path / "one"))


def test_a_lower_k_reaches_the_graph(tmp_path):
    checkpoint, data = saved("vmoe", tmp_path)
    finetune(checkpoint, data, Seer(top_k=1), quick(4), tmp_path / "lower")
    manifest = export(tmp_path / "lower", tmp_path / "exported", RUNNER)
    assert [(block.experts, block.top_k) for block in manifest.blocks] == [(EXPERTS, 1)] * 2


def test_routers_learn_from_a_teacher_without_labels(tmp_path):
    checkpoint, data = saved("vmoe", tmp_path)
    pixels = np.load(data)["pixel_values"]
    np.savez(tmp_path / "unlabelled.npz", pixel_values=pixels)
    done = finetune(checkpoint, tmp_path / "unlabelled.npz", RouterKD(checkpoint), quick(2), tmp_path / "out")
    assert done.teacher_sha256 == checkpoint_sha256(checkpoint)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (record["options"], record["teacher_sha256"]) == ({"temperature": 1.0}, checkpoint_sha256(checkpoint))


@pytest.mark.parametrize("method", [Plain(), TaskSpecific(windows=1)])
def test_weights_keep_the_dtypes_that_they_have_in_the_checkpoint(method, tmp_path):
    checkpoint, data = saved("olmoe", tmp_path)
    model = TINY["olmoe"]().bfloat16()
    for layer in find_moe_layers(model):
        layer.router.float()
    shutil.rmtree(checkpoint)
    save_model(model, checkpoint)
    finetune(checkpoint, data, method, quick(2), tmp_path / "out")
    before, after = (
        {name: tensor.dtype for name, tensor in read_tensors(path / "model.safetensors").items()}
        for path in (checkpoint, tmp_path / "out")
    )
    assert set(before.values()) == {"BF16", "F32"}
    assert after.items() <= before.items()  # fewer, where experts went
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.dtype == torch.bfloat16


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError) as caught:
        finetune(tmp_path / "nothing", tmp_path / "nothing", Plain(), quick(1), tmp_path)
    assert caught.value.what == f"{tmp_path} already exists"


@pytest.mark.parametrize(
    ("name", "method", "what"),
    [
        ("vmoe", TaskSpecific(floor=9), "--floor 9 asks for 9 experts, but layer layers.1.mlp has 8"),
        ("vmoe", TaskSpecific(windows=8), "the first half of 10 steps cannot be divided into 8 windows"),
        (
            "deepseek_v3",
            TaskSpecific(),
            "layer model.layers.0.mlp routes in 2 groups, which experts that go one by one leave uneven",
        ),
        ("vmoe", Seer(top_k=3), "--top-k 3 is more than the K=2 that the model has"),
    ],
)
def test_what_cannot_be_is_refused_before_any_data_is_read(name, method, what, tmp_path):
    checkpoint, _ = saved(name, tmp_path)
    with pytest.raises(UserError) as caught:
        finetune(checkpoint, tmp_path / "nothing.npz", method, quick(10), tmp_path / "out")
    assert caught.value.what == what


FIXED = "every router of a phimoe model selects K=2 experts, so layer model.layers.0.mlp cannot select 1"
SHARED = "the attention of jetmoe {} as many experts as its MLPs, and the config.json of {} one count for both"


@pytest.mark.parametrize(
    ("name", "method", "what"),
    [
        ("jetmoe", TaskSpecific(), SHARED.format("has", "{}")),
        ("jetmoe", Seer(top_k=1), SHARED.format("selects", "{}")),
        ("phimoe", TaskSpecific(), FIXED),
        ("phimoe", Seer(top_k=1), FIXED),
    ],
)
def test_counts_that_no_checkpoint_of_the_family_has_are_refused_before_any_data_is_read(name, method, what, tmp_path):
    save_model(tiny(name), tmp_path / name)
    with pytest.raises(UserError) as caught:
        finetune(tmp_path / name, tmp_path / "nothing.npz", method, quick(10), tmp_path / "out")
    assert caught.value.what == what.format(tmp_path / name)


def test_a_teacher_of_another_width_is_refused_before_any_data_is_read(tmp_path):
    checkpoint, _ = saved("vmoe", tmp_path)
    teacher, _ = saved("mixtral", tmp_path / "other")
    with pytest.raises(UserError) as caught:
        finetune(checkpoint, tmp_path / "nothing.npz", RouterKD(teacher), quick(10), tmp_path / "out")
    assert caught.value.what == "the model gives 10 logits, its teacher 128"
