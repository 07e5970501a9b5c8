"""A plain torch module to a model directory with one experts node a layer."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from exporter.sources import Prepare, pieces_of, require_merging
from exporter.tasks import Feeds, Task
from exporter.trace import TRACED
from exporter.write import OPSET, How, Opened, write
from models.plain import Example, PlainModel
from moe_spec.decoder import BATCH, SEQUENCE
from moe_spec.files import refuse_existing
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from moe_spec.progress import Progress, silent
from moe_spec.runner import Runner


def export_module(
    model: PlainModel,
    out: Path,
    runner: Runner,
    *,
    opset: int = OPSET,
    plan: PruningPlan | None = None,
    prepare: Prepare | None = None,
    on_progress: Progress = silent,
) -> Manifest:
    """Export an adapted module to the new directory ``out`` and check it against torch, as `export` does a checkpoint.

    Axes of inputs are dynamic where ``model.example`` gives other sizes for another batch or length.

    Args:
        model: from ``models.plain.plain_model``, in float32.
        out: a directory that does not exist.
        runner: runs the result.
        opset: of the graph.
        plan: which experts stay; its hash is ``model.sha256()``.
        prepare: changes the model before it is traced, as ``pruning.apply.apply_plan`` does for ``plan``.
        on_progress: told what is written next, and how many bytes of all are.

    Raises:
        UserError: a module that torch cannot trace, a plan for another one, or one that was not applied, or an output
            that exists.
        VerificationError: the exported graph does not compute what torch computes.
    """
    refuse_existing(out)
    identity = model.sha256()
    if plan is not None:
        plan.require_model(identity, "the module")
    require_merging(plan, prepare)
    if prepare is not None:
        prepare(model)
    called = task_of_example(model.example, model.outputs)
    opened = Opened(model, called, pieces_of(model), identity, lambda: model, plan=plan)
    return write(opened, out, runner, How(opset), on_progress)


def task_of_example(example: Example, outputs: tuple[str, ...]) -> Task:
    """How a module is called for which ``example`` gives inputs.

    >>> task_of_example(lambda batch, length: {"x": torch.zeros(batch, 3, length)}, ("y",)).axes
    {'x': {0: 'batch_size', 2: 'sequence_length'}}
    """
    batch, length = TRACED
    traced, others = example(batch, length), {BATCH: example(batch + 1, length), SEQUENCE: example(batch, length + 1)}

    def axes(name: str) -> dict[int, str]:
        shape = traced[name].shape
        changed = {axis: said for said, other in others.items() for axis in _changed(shape, other[name].shape)}
        return dict(sorted(changed.items()))

    def feeds(_: PreTrainedConfig, batch: int, sequence: int, _rng: np.random.Generator) -> Feeds:
        return {name: value.numpy() for name, value in example(batch, sequence).items()}

    return Task({name: axes(name) for name in traced}, outputs, feeds)


def _changed(shape: torch.Size, other: torch.Size) -> list[int]:
    return [axis for axis, (one, another) in enumerate(zip(shape, other, strict=True)) if one != another]
