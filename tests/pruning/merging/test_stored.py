"""Merged checkpoints are written from file to file; the witness is the model in memory."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import load_model, save_model
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import MEAN
from pruning.apply import apply_plan
from pruning.prune import prune
from tests.families.configs import tiny
from tests.models_table import TINY
from tests.pruning.merging.plans import merging


def assert_merged_as_in_memory(model, checkpoint, out) -> None:
    plan = dataclasses.replace(merging(model, router=MEAN), model_sha256=checkpoint_sha256(checkpoint))
    plan.save(checkpoint.with_name("plan.json"))
    prune(checkpoint, checkpoint.with_name("plan.json"), out, shard_bytes=1 << 16)
    apply_plan(model, plan)
    merged, expected = load_model(out, dtype=None).state_dict(), model.state_dict()
    assert merged.keys() == expected.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", ["dbrx", "switch_transformers"])
def test_experts_stay_in_the_layout_of_published_checkpoints(name, tmp_path, monkeypatch):
    """One tensor for all, its rows in runs; or experts that are called by names of their own."""
    save_model(tiny(name), tmp_path / name)
    model = load_model(tmp_path / name)
    monkeypatch.setattr("pruning.prune.load_model", None)  # the model is never in memory
    assert_merged_as_in_memory(model, tmp_path / name, tmp_path / "merged")


@pytest.mark.parametrize("stacked", [False, True])
def test_halves_are_rounded_as_in_memory_however_they_lie(stacked, tmp_path):
    """Stacked, experts lie otherwise than transformers saves them: then the model is merged in memory."""
    model = TINY["mixtral"]().bfloat16()
    save_model(model, tmp_path / "mixtral")
    if stacked:
        save_file(model.state_dict(), tmp_path / "mixtral" / "model.safetensors", {"format": "pt"})
    assert_merged_as_in_memory(model, tmp_path / "mixtral", tmp_path / "merged")
