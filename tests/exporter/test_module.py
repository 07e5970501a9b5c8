"""A module of no family goes from torch to ONNX, and what is pruned before is what is pruned after."""

import functools
import re

import numpy as np
import pytest
import torch

from exporter.module import export_module
from graph_passes.optimize import optimize
from models.moe_layers import find_moe_layers
from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from pruning.apply import apply_plan
from tests.plain_modules import ADAPTERS, EXPERTS, adapted_net, example
from tests.zoo import RUNNER

KEEPS = {"module.blocks.0": (1, 4), "module.blocks.1": (0, 2, 5)}


def plan_of(model):
    layers = tuple(LayerPlan(layer.name, EXPERTS, 2, KEEPS[layer.name]) for layer in find_moe_layers(model))
    return PruningPlan(model.sha256(), "by hand", layers)


def run(directory):
    feeds = {name: value.numpy() for name, value in example(3, 7).items()}
    return RUNNER.run(directory / MODEL, [feeds])[0]


@pytest.mark.parametrize("name", ADAPTERS)
def test_pruning_before_the_export_and_after_it_give_the_same(name, tmp_path):
    model, other = adapted_net(name), adapted_net(name)
    made = plan_of(model)
    exported = export_module(model, tmp_path / "whole", RUNNER)
    assert [block.name for block in exported.blocks] == list(KEEPS)
    assert [tensor.shape for tensor in exported.inputs] == [("batch_size", "sequence_length", 16)]
    assert [tensor.name for tensor in exported.outputs] == ["scores", "pooled"]
    optimize(tmp_path / "whole", tmp_path / "after", RUNNER, plan=made, form="dense")
    prepare = functools.partial(apply_plan, plan=made)
    before = export_module(other, tmp_path / "before", RUNNER, plan=made, prepare=prepare)
    assert [block.keep for block in before.blocks] == list(KEEPS.values())
    with torch.no_grad():
        expected = other(**example(3, 7))
    for key, got in run(tmp_path / "after").items():
        np.testing.assert_allclose(got, run(tmp_path / "before")[key], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got, expected[key], rtol=1e-5, atol=1e-5)


def test_a_plan_of_another_module_is_refused(tmp_path):
    model = adapted_net("MoE")
    made = plan_of(adapted_net("HomeMade"))
    with pytest.raises(UserError, match=re.escape("the module")):
        export_module(model, tmp_path / "out", RUNNER, plan=made)
    assert not (tmp_path / "out").exists()
