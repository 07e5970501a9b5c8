"""Pruning from files to files gives what pruning in memory gives."""

import json
import shutil
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import models.tensor_files
from models.checkpoints import load_model, save_model
from models.moe_layers import find_moe_layers
from models.tensor_files import INDEX, Span, StoredTensor, write_tensors
from moe_spec.errors import UserError
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from pruning.prune import prune
from pruning.stream import without_dropped
from tests.models_table import TINY, example_inputs
from tests.oracle import plan_for
from tests.same_model import assert_same_model

SMALL_SHARD = 20_000


def save_fused(model, directory):
    """One tensor for all experts of a layer, as transformers 5 has them in memory."""
    model.save_pretrained(directory, save_original_format=False)


def save_shards(model, directory):
    model.save_pretrained(directory, max_shard_size=SMALL_SHARD)


def save_half(model, directory):
    """bfloat16 but for the routers, as checkpoints of large models are."""
    model.bfloat16()
    save_model(model, directory)
    path = directory / "model.safetensors"
    stored = load_file(path)
    routers = {name: tensor.float() for name, tensor in stored.items() if "gate." in name or "router." in name}
    assert routers
    save_file(stored | routers, path, metadata={"format": "pt"})


LAYOUTS = {"as_saved": save_model, "fused": save_fused, "shards": save_shards, "half": save_half}


def some(model):
    """Some of eight experts, others in each layer; where there are groups, two of each."""
    layers = find_moe_layers(model)
    keeps = [(1, 2, 5, 7), (0, 3, 4, 6)] if layers[0].groups is not None else [(1, 4, 6), (0, 2, 7)]
    return plan_for(model, {layer.name: keep for layer, keep in zip(layers, keeps, strict=True)})


def planned(checkpoint, layers):
    """The path of a plan for ``checkpoint`` beside it."""
    path = checkpoint.with_name("plan.json")
    PruningPlan(checkpoint_sha256(checkpoint), "by hand", layers).save(path)
    return path


def saved(name, save, tmp_path):
    """A checkpoint, and a plan for it."""
    model, checkpoint = TINY[name](), tmp_path / name
    plan = some(model)
    save(model, checkpoint)
    return checkpoint, planned(checkpoint, plan.layers)


def in_memory(checkpoint, plan, out):
    """What a model that is loaded, pruned and saved is on disk."""
    model = load_model(checkpoint, dtype=None)
    apply_plan(model, PruningPlan.load(plan))
    save_model(model, out)
    return out


def tensors(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(model):
    with torch.no_grad():
        return model(**example_inputs(model, batch=3, sequence=6, seed=0)).logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TINY)
def test_it_is_the_model_that_is_loaded_pruned_and_saved(name, layout, tmp_path, capfd):
    checkpoint, plan = saved(name, LAYOUTS[layout], tmp_path)
    memory = in_memory(checkpoint, plan, tmp_path / "memory")
    capfd.readouterr()
    out = prune(checkpoint, plan, tmp_path / "out", shard_bytes=SMALL_SHARD)
    assert capfd.readouterr() == ("", "")
    streamed, expected = (load_model(each, dtype=None).state_dict() for each in (out, memory))
    assert {key: tensor.dtype for key, tensor in streamed.items()} == {key: expected[key].dtype for key in expected}
    assert_same_model(load_model(out), load_model(memory), logits)
    assert (out / "config.json").read_text() == (memory / "config.json").read_text()


@pytest.mark.parametrize("name", TINY)
def test_without_shards_the_file_is_the_same_to_the_byte(name, tmp_path):
    checkpoint, plan = saved(name, save_model, tmp_path)
    out, expected = prune(checkpoint, plan, tmp_path / "out"), in_memory(checkpoint, plan, tmp_path / "memory")
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", ["as_saved", "shards"])
def test_shards_are_as_small_as_asked_and_readable(layout, tmp_path):
    checkpoint, plan = saved("qwen3_moe", LAYOUTS[layout], tmp_path)
    out = prune(checkpoint, plan, tmp_path / "out", shard_bytes=SMALL_SHARD)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1
    assert (out / INDEX).is_file()
    assert max(path.stat().st_size for path in shards) < SMALL_SHARD * 1.1  # the header comes on top
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}


def test_dtypes_stay_as_they_are_stored_tensor_by_tensor(tmp_path):
    checkpoint, plan = saved("deepseek_v3", save_half, tmp_path)
    stored = tensors(prune(checkpoint, plan, tmp_path / "out"))
    assert stored["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert stored["model.layers.0.mlp.experts.3.up_proj.weight"].dtype == torch.bfloat16


def edit(checkpoint, change):
    """The stored tensors of a checkpoint of one file changed by ``change``."""
    path = checkpoint / "model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path, metadata={"format": "pt"})


def test_what_the_model_does_not_know_is_copied_as_it_is(tmp_path):
    checkpoint, _ = saved("deepseek_v3", save_model, tmp_path)
    further = {
        "model.layers.2.mlp.gate.weight": torch.randn(8, 32),
        "model.layers.2.mlp.experts.7.up_proj.weight": torch.randn(48, 32),
        "model.layers.2.eh_proj.weight": torch.randn(32, 64),
    }
    edit(checkpoint, lambda stored: stored.update(further))
    plan = planned(checkpoint, some(TINY["deepseek_v3"]()).layers)
    out = prune(checkpoint, plan, tmp_path / "out")
    pruned = tensors(out)
    for name, tensor in further.items():
        assert torch.equal(pruned[name], tensor)
    assert_same_model(load_model(out), load_model(in_memory(checkpoint, plan, tmp_path / "memory")), logits)


def test_tied_weights_are_stored_once_before_and_after(tmp_path):
    checkpoint, _ = saved("olmoe", save_model, tmp_path)
    edit(checkpoint, lambda stored: stored.pop("lm_head.weight"))
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    plan = planned(checkpoint, some(TINY["olmoe"]()).layers)
    out = prune(checkpoint, plan, tmp_path / "out")
    assert "lm_head.weight" not in tensors(out)
    assert_same_model(load_model(out), load_model(in_memory(checkpoint, plan, tmp_path / "memory")), logits)


def test_a_layer_that_the_plan_does_not_name_stays_as_it_is(tmp_path):
    checkpoint, _ = saved("mixtral", save_model, tmp_path)
    everyone = LayerPlan("model.layers.0.mlp", 8, 2, tuple(range(8)))
    out = prune(checkpoint, planned(checkpoint, (everyone,)), tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def refusal(checkpoint, plan, tmp_path):
    """The error, after which nothing new lies beside the checkpoint."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        prune(checkpoint, plan, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    return caught.value.what, caught.value.hint


AGAIN = "get the checkpoint again, complete"
EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "what", "hint"),
    [
        (
            lambda stored: stored.pop("model.norm.weight"),
            "{} lacks 1 weights that its config.json asks for, the first is 'model.norm.weight'",
            AGAIN,
        ),
        (
            lambda stored: stored.pop(EXPERT.format(3)),
            "{} has 23,040 values for 'model.layers.1.mlp.experts.gate_up_proj', its config.json asks for 24,576",
            "config.json and the weights must describe the same model; get the checkpoint again",
        ),
        (
            lambda stored: stored.update({EXPERT.format(8): stored.pop(EXPERT.format(3))}),
            "{} has model.layers.1.mlp.experts.*.up_proj.weight for the experts [0, 1, 2, 4, 5, 6, 7, 8], "
            "expected 0 to 7",
            AGAIN,
        ),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused(change, what, hint, tmp_path):
    checkpoint, _ = saved("qwen3_moe", save_model, tmp_path)
    edit(checkpoint, change)
    plan = planned(checkpoint, some(TINY["qwen3_moe"]()).layers)
    assert refusal(checkpoint, plan, tmp_path) == (what.format(checkpoint), hint)


def test_experts_in_an_order_that_is_unknown_are_refused(tmp_path):
    tensor = StoredTensor("F32", (16, 32), (Span(tmp_path / "a", 0, 2048),))
    plan = {"w": LayerPlan("layers.0", 8, 2, (0, 1))}
    with pytest.raises(UserError) as caught:
        without_dropped({"layers.0.w1": tensor}, {"layers.0.w1": "w"}, plan, tmp_path)
    assert (caught.value.what, caught.value.hint) == (
        f"layers.0.w1 in {tmp_path} has the shape [16, 32], expected 8 experts on its first axis",
        "load the checkpoint with transformers and save it again: model.save_pretrained(DIR)",
    )


def test_a_cut_or_lost_shard_is_refused(tmp_path):
    checkpoint, plan = saved("olmoe", save_shards, tmp_path)
    shard = sorted(checkpoint.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    plan = planned(checkpoint, PruningPlan.load(plan).layers)
    what, hint = refusal(checkpoint, plan, tmp_path)
    assert what.startswith(f"{shard} is no complete safetensors file: ")
    assert hint == AGAIN
    shard.unlink()
    plan = planned(checkpoint, PruningPlan.load(plan).layers)
    assert refusal(checkpoint, plan, tmp_path) == (f"{shard} is missing, {INDEX} names it", AGAIN)


def test_an_index_that_leads_outside_is_refused(tmp_path):
    checkpoint, plan = saved("olmoe", save_shards, tmp_path)
    elsewhere = shutil.copy(sorted(checkpoint.glob("*.safetensors"))[0], tmp_path / "elsewhere.safetensors")
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = f"../{elsewhere.name}"
    (checkpoint / INDEX).write_text(json.dumps(index))
    what, _ = refusal(checkpoint, plan, tmp_path)
    assert what == f"{checkpoint / INDEX} names the file '../elsewhere.safetensors', which lies outside {checkpoint}"


def test_an_end_in_the_middle_of_a_shard_leaves_nothing(tmp_path, monkeypatch):
    checkpoint, plan = saved("olmoe", save_shards, tmp_path)
    copy, copied = models.tensor_files._copy, []

    def interrupted(span, target, buffer):
        copied.append(span)
        if len(copied) == 20:
            raise KeyboardInterrupt
        copy(span, target, buffer)

    monkeypatch.setattr(models.tensor_files, "_copy", interrupted)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        prune(checkpoint, plan, tmp_path / "out", shard_bytes=SMALL_SHARD)
    assert len(copied) == 20
    assert sorted(tmp_path.rglob("*")) == before


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    block = tmp_path / "block"
    block.write_bytes(bytes(1 << 20))
    fused = StoredTensor("BF16", (64, 1 << 19), (Span(block, 0, 1 << 20),) * 64)
    write_tensors({"w": fused}, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_slice("w").get_shape() == [64, 1 << 19]
    stored = models.tensor_files.read_tensors(tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    tracemalloc.start()
    write_tensors({"w": stored["w"].rows(range(0, 64, 2))}, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (out / "model.safetensors").stat().st_size > 32 << 20
    assert peak < 4 << 20
