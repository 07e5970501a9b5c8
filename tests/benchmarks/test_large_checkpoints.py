import math

import pytest
import torch

from benchmarks.command import Usage
from benchmarks.large_checkpoints import QUICK_SHAPES, Row, Shape, measure, report, save_large
from models.checkpoints import load_model
from moe_spec.identity import checkpoint_weights


def test_the_whole_model_has_the_size_that_is_published():
    assert sum(math.prod(shape) for shape in Shape(layers=16).tensors.values()) == 6_919_161_856


def test_a_large_checkpoint_is_one_that_loads_and_runs(tmp_path):
    save_large(QUICK_SHAPES[1], tmp_path / "model")
    model = load_model(tmp_path / "model")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    assert [path.name for path in checkpoint_weights(tmp_path / "model")] == ["model.safetensors"]


def test_bytes_go_with_the_experts():
    row = measure(QUICK_SHAPES[0])
    shapes = QUICK_SHAPES[0].tensors
    dropped = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." in name) // 2
    dropped += math.prod(shapes["model.layers.0.mlp.gate.weight"]) // 2
    assert row.bytes_before - row.bytes_after == pytest.approx(2 * dropped, abs=2000)  # the header gets shorter too
    assert min(usage.peak_bytes for usage in (row.calibrate, row.plan, row.prune)) > 0


def test_the_document_says_how_memory_grows_with_the_model():
    def row(layers, gigabytes, peaks):
        calibrate, plan, prune = (Usage(seconds=12.5, peak_bytes=peak << 20) for peak in peaks)
        return Row(layers, gigabytes * 10**9, gigabytes * 10**9 // 2, calibrate, plan, prune, cp_seconds=4.0)

    text = report([row(2, 2, (4000, 80, 390)), row(16, 14, (4500, 81, 396))], "command")
    assert "| 16 | 14.00 GB | 7.00 GB | 12.5 s | 4,500 MB | 12.5 s | 81 MB | 12.5 s | 396 MB | 4.0 s |" in text
    assert "grows by 12.0 GB, the peak memory of `calibrate` by 500 MB,\nthat of `prune` by 6 MB." in text
