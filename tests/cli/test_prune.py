import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pruning.prune
from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from moe_spec.identity import checkpoint_sha256
from moe_spec.plan import PruningPlan
from tests.cli.helpers import invoke, leftovers
from tests.models_table import TINY
from tests.oracle import plan_for


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "gpt_oss"
    save_model(TINY["gpt_oss"](), directory)
    return directory


@pytest.fixture
def plan(checkpoint, tmp_path):
    model = TINY["gpt_oss"]()
    layers = plan_for(model, {layer.name: (1, 3, 4) for layer in find_moe_layers(model)}).layers
    path = tmp_path / "plan.json"
    PruningPlan(checkpoint_sha256(checkpoint), "by hand", layers).save(path)
    return path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def size(directory):
    return (directory / "model.safetensors").stat().st_size


def test_prune_writes_a_checkpoint_and_one_line(checkpoint, plan, tmp_path):
    out = tmp_path / "pruned"
    code, stdout, stderr = invoke("prune", checkpoint, "--plan", plan, "-o", out)
    assert (code, stderr) == (0, "")
    assert stdout == f"{out}: {size(out):,} bytes of weights, {size(checkpoint):,} before\n"
    assert [layer.num_experts for layer in find_moe_layers(load_model(out))] == [3, 3]


def test_json_names_the_new_model(checkpoint, plan, tmp_path):
    out = tmp_path / "pruned"
    code, stdout, stderr = invoke("prune", checkpoint, "--plan", plan, "-o", out, "--json")
    assert (code, stderr) == (0, "")
    assert json.loads(stdout) == {
        "output": str(out),
        "model_sha256": checkpoint_sha256(out),
        "weight_bytes": size(out),
        "weight_bytes_before": size(checkpoint),
        "not_pruned": [],
    }


def test_experts_that_no_plan_reaches_are_named(tmp_path):
    checkpoint, out, model = tmp_path / "deepseek_v3", tmp_path / "pruned", TINY["deepseek_v3"]()
    save_model(model, checkpoint)
    path = checkpoint / "model.safetensors"
    further = {f"model.layers.2.mlp.experts.{expert}.up_proj.weight": torch.zeros(48, 32) for expert in range(8)}
    save_file(load_file(path) | further, path, metadata={"format": "pt"})
    layers = plan_for(model, {layer.name: (1, 3, 4, 6) for layer in find_moe_layers(model)}).layers
    PruningPlan(checkpoint_sha256(checkpoint), "by hand", layers).save(tmp_path / "plan.json")
    code, stdout, stderr = invoke("prune", checkpoint, "--plan", tmp_path / "plan.json", "-o", out)
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[1:] == [
        "  note: 8 tensors of experts are of layers that transformers does not load, and are all",
        "  there still; the first is model.layers.2.mlp.experts.0.up_proj.weight",
    ]
    assert further.keys() <= load_file(out / "model.safetensors").keys()


def refused(checkpoint, plan, tmp_path, out="out"):
    before = leftovers(tmp_path)
    code, stdout, stderr = invoke("prune", checkpoint, "--plan", plan, "-o", tmp_path / out)
    assert (code, stdout) == (1, "")
    assert leftovers(tmp_path) == before
    return stderr


REMAKE = "hint: make it again with `moe-edge plan`\n"


def test_a_missing_checkpoint_or_plan_is_refused(checkpoint, plan, tmp_path):
    nothing = tmp_path / "nothing"
    error = f"error: {nothing} does not exist, expected a checkpoint directory\nhint: check the path\n"
    assert refused(nothing, plan, tmp_path) == error
    error = f"error: {nothing} does not exist, expected a plan (JSON)\nhint: check the path\n"
    assert refused(checkpoint, nothing, tmp_path) == error


def test_pickled_weights_are_refused(checkpoint, plan, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((checkpoint / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert refused(pickled, plan, tmp_path) == (
        f"error: {pickled} holds pickled weights (pytorch_model.bin), which can run code when they are read\n"
        "hint: convert them where you trust them: model.save_pretrained(DIR) writes safetensors\n"
    )


def test_a_plan_for_another_model_is_refused(checkpoint, plan, tmp_path):
    edit(plan, model_sha256="0" * 64)
    assert refused(checkpoint, plan, tmp_path) == (
        f"error: the plan was made for model 000000000000, but {checkpoint} is model "
        f"{checkpoint_sha256(checkpoint)[:12]}\n"
        "hint: make a plan for this model with `moe-edge plan`; if it is the same model exported by another tool: "
        "optimize --any-model\n"
    )


def test_an_unknown_layer_is_refused_with_the_known_ones(checkpoint, plan, tmp_path):
    made = PruningPlan.load(plan)
    renamed = dataclasses.replace(made.layers[1], name="model.layers.7.mlp")
    dataclasses.replace(made, layers=(made.layers[0], renamed)).save(plan)
    assert refused(checkpoint, plan, tmp_path) == (
        "error: the plan names layer 'model.layers.7.mlp', which the model does not have\n"
        "hint: did you mean 'model.layers.1.mlp'? known: model.layers.0.mlp, model.layers.1.mlp\n"
    )


def test_a_plan_edited_to_keep_fewer_than_k_is_refused(checkpoint, plan, tmp_path):
    layers = json.loads(plan.read_text())["layers"]
    layers[0]["keep"] = [4]
    edit(plan, layers=layers)
    assert refused(checkpoint, plan, tmp_path) == (
        "error: layer model.layers.0.mlp keeps 1 of 8 experts, but its router selects K=2 a token\n"
        "hint: keep at least 2: --keep 2; or let K shrink with the layer: --clamp-top-k\n"
    )


def test_a_plan_that_is_none_is_refused(checkpoint, plan, tmp_path):
    text = plan.read_text()
    plan.write_text(text[: len(text) // 2])
    assert refused(checkpoint, plan, tmp_path).startswith(f"error: {plan} is no complete JSON: ")
    plan.write_text(text)
    edit(plan, schema=3)
    error = f"error: {plan} has plan schema 3, this moe-edge reads 2\nhint: update moe-edge, or {REMAKE[6:]}"
    assert refused(checkpoint, plan, tmp_path) == error
    edit(plan, artifact="manifest")
    error = f"error: {plan} is a manifest, expected a plan\n{REMAKE}"
    assert refused(checkpoint, plan, tmp_path) == error


def test_an_existing_output_is_refused(checkpoint, plan, tmp_path):
    error = f"error: {tmp_path} already exists\nhint: give another -o, or remove it first: rm -r {tmp_path}\n"
    assert refused(checkpoint, plan, tmp_path, out=".") == error


def test_ctrl_c_while_writing_leaves_nothing(checkpoint, plan, tmp_path, monkeypatch):
    def half(tensors, directory, *_):
        (directory / "model.safetensors").write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning.prune, "write_tensors", half)
    arguments = ("prune", checkpoint, "--plan", plan, "-o", tmp_path / "out")
    assert invoke(*arguments) == (130, "", "interrupted; nothing half-written is left\n")
    assert leftovers(tmp_path) == {"plan.json"}
