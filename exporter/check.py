"""Trust nothing of a trace: count the experts, run shapes that were not traced, compare with torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from transformers import PreTrainedModel

from exporter.tasks import Task
from exporter.trace import run_torch
from models.moe_layers import MoELayer
from moe_spec.errors import UserError, VerificationError
from moe_spec.experts_op import DOMAIN
from moe_spec.record import Json
from moe_spec.runner import Runner, error_between

SHAPES = ((1, 1), (3, 7), (2, 12))
"""(batch, sequence) that were not traced; the first is a single token or example."""

TOLERANCE = 1e-5
"""Of the float32 outputs, relative to the largest magnitude of the output."""


def check_experts(proto: onnx.ModelProto, layers: Sequence[MoELayer]) -> None:
    """Every layer that is an experts node must be in the graph with every expert: tracing can lose some.

    Raises:
        UserError: a layer is missing, or has another number of experts than the model.
    """
    experts = {tensor.name: tensor.dims[0] for tensor in proto.graph.initializer if tensor.dims}
    found = {
        node.name.removesuffix(".experts"): experts[node.input[3]]
        for node in proto.graph.node
        if node.domain == DOMAIN and node.input[3] in experts
    }
    for layer in layers:
        if found.get(layer.name) != layer.num_experts:
            raise UserError(
                f"the traced graph has {found.get(layer.name, 'no')} experts in layer {layer.name}, "
                f"the model has {layer.num_experts}",
                hint="this is a fault of the export, not of your model: please report it with the model's config.json",
            )


def check_parity(model: PreTrainedModel, task: Task, path: Path, runner: Runner) -> list[Json]:
    """Run ``path`` at `SHAPES` and compare each output with torch; the errors, for the manifest.

    Raises:
        VerificationError: an axis came out static, or an output differs by more than `TOLERANCE`.
    """
    rng = np.random.default_rng(1)
    batches = [task.example(model.config, batch, sequence, rng) for batch, sequence in SHAPES]
    results = runner.run(path, batches)
    report: list[Json] = []
    for shape, feeds, got in zip(SHAPES, batches, results, strict=True):
        for name, expected in run_torch(model, task, feeds).items():
            if got[name].shape != expected.shape:
                raise VerificationError(
                    f"an axis came out static: output {name} has shape {got[name].shape} for batch and sequence "
                    f"{shape}, torch gives {expected.shape}"
                )
            largest, relative = error_between(expected, got[name])
            report.append({"shape": list(shape), "output": name, "max_abs": largest, "max_rel": relative})
            if relative > TOLERANCE:
                raise VerificationError(
                    f"output {name} differs from torch by {relative:.2e} of its range at batch and sequence {shape}, "
                    f"allowed is {TOLERANCE:.0e}"
                )
    return report
