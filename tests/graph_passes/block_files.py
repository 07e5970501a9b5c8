"""Models of `block_models` as files: written, planned for and run, and looked at once they were rewritten."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL
from moe_spec.plan import PruningPlan
from tests.graph_passes.block_models import Spec, save, why_not, why_not_run
from tests.zoo import RUNNER

THREE, ONE, ALL = (1, 4, 5), (5,), tuple(range(8))


def saved(spec: Spec, folder: Path) -> Path:
    """The model of ``spec`` as a file; skipped where there is none."""
    reason = why_not(spec) or why_not_run(spec)
    if reason is not None:
        pytest.skip(f"no such model, or ONNX Runtime cannot run it: {reason}")
    save(spec, folder / "block.onnx")
    return folder / "block.onnx"


def plan(source: Path, *layers: LayerPlan) -> PruningPlan:
    """A plan for the file ``source``."""
    return PruningPlan(onnx_sha256(source), "by hand", layers)


def tokens(spec: Spec, count: int = 37) -> np.ndarray:
    """(T, H), what the model reads."""
    return np.random.default_rng(spec.seed).standard_normal((count, spec.hidden)).astype(spec.dtype)


def run(model: Path, x: np.ndarray, name: str = MODEL) -> dict[Any, np.ndarray]:
    """What a file, or file ``name`` of a directory, gives for ``x``."""
    path = model / name if model.is_dir() else model
    return RUNNER.run(path, [{"x": x}])[0]


def assert_clean(directory: Path) -> None:
    """A valid file in which every initialiser is used, and every function and operator set."""
    model = onnx.load(directory / MODEL)
    onnx.checker.check_model(str(directory / MODEL))
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    assert {tensor.name for tensor in model.graph.initializer} <= used
    domains = {node.domain for node in model.graph.node}
    assert {entry.domain for entry in model.opset_import} - {""} <= domains
