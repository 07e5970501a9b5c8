"""Values for an export: what is read from a checkpoint's files is what the changed model in memory has."""

from functools import partial

import pytest
import torch

from exporter import sources
from exporter.sources import open_model, prepared
from models.checkpoints import save_model
from models.moe_layers import find_moe_layers
from moe_spec.identity import checkpoint_sha256
from moe_spec.layer_plan import ALIAS, MEAN, NEW, LayerPlan, Merge
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from tests.families.configs import tiny

GROUPS = {0: (0, 1), 2: (2, 3), 4: (4, 7), 5: (5, 6)}
"""By survivor; inside routing groups where there are any."""

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "dbrx", "vmoe")
"""Fused or not, transposed, biased, in turns; with selection biases; stored as one, in runs, or an expert each."""


def plan_of(checkpoint, name: str, router: str) -> PruningPlan:
    merges = tuple(Merge(ids, (1.0, 0.3)) for ids in GROUPS.values())
    layers = tuple(
        LayerPlan(layer.name, 8, layer.top_k, tuple(GROUPS), (), layer.groups, router=router, merge=merges, align=True)
        for layer in find_moe_layers(tiny(name))
    )
    return PruningPlan(checkpoint_sha256(checkpoint), "by hand", layers, {"seed": 3})


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_experts_are_those_of_the_model_in_memory(name, tmp_path, monkeypatch):
    checkpoint = tmp_path / name
    save_model(tiny(name), checkpoint)
    for router in (MEAN, NEW, ALIAS):
        plan = plan_of(checkpoint, name, router)
        whole = prepared(checkpoint, partial(apply_plan, plan=plan)).state_dict()
        with monkeypatch.context() as patched:
            patched.setattr(sources, "load_model", None)  # nothing is read into memory
            model, pieces = open_model(checkpoint, plan, partial(apply_plan, plan=plan))
        assert any(parameter.is_meta for parameter in model.parameters())
        for key, expected in whole.items():
            assert torch.equal(torch.cat(list(pieces(key, torch.float32))), expected.float()), key
