"""fp16 graphs: experts stay fp16, routers are written in float32."""

import numpy as np
import onnx
import pytest
import torch

from exporter.bind import save
from exporter.sources import pieces_of
from exporter.tasks import task_of
from exporter.trace import trace
from graph_passes.optimize import optimize
from models.checkpoints import load_model
from models.moe_layers import find_moe_layers
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from tests.zoo import RUNNER


@pytest.fixture(scope="module")
def half(zoo, tmp_path_factory):
    """mixtral traced in fp16."""
    model = load_model(zoo.checkpoint("mixtral"))
    layers = find_moe_layers(model)
    path = tmp_path_factory.mktemp("half") / "half.onnx"
    traced = trace(model, task_of(type(model).__name__), layers, 20, torch.float16)
    save(traced, pieces_of(model), path)
    plan = PruningPlan(onnx_sha256(path), "by hand", tuple(LayerPlan(row.name, 8, 2, (0, 2, 5)) for row in layers))
    return path, plan


@pytest.mark.parametrize("form", ["dense", "sorted", "gather"])
def test_experts_stay_half_and_the_router_is_float(half, tmp_path, form):
    source, plan = half
    manifest = optimize(source, tmp_path / "out", RUNNER, plan=plan, form=form)
    model = onnx.load(tmp_path / "out" / MODEL)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    experts = {value for name, value in types.items() if "/experts." in name}
    routers = {value for name, value in types.items() if "/router." in name}
    assert (experts, routers) == ({onnx.TensorProto.FLOAT16}, {onnx.TensorProto.FLOAT})
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 2e-3
    ids = np.arange(6, dtype=np.int64).reshape(2, 3)
    logits = RUNNER.run(tmp_path / "out" / MODEL, [{"input_ids": ids, "attention_mask": np.ones_like(ids)}])[0][
        "logits"
    ]
    assert logits.dtype == np.float16
