"""A checkpoint to a model directory with one experts node a layer."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from exporter.sources import Prepare, open_model, prepared, require_merging
from exporter.tasks import task_of, with_cache
from exporter.weightless import weightless
from exporter.write import OPSET, How, Opened, write
from models.checkpoints import own_code, stored_tensors
from moe_spec.external_data import INLINE_BYTES
from moe_spec.files import refuse_existing
from moe_spec.identity import checkpoint_sha256
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from moe_spec.progress import Progress, silent
from moe_spec.runner import Runner


def export(
    checkpoint: Path,
    out: Path,
    runner: Runner,
    *,
    opset: int = OPSET,
    plan: PruningPlan | None = None,
    prepare: Prepare | None = None,
    task: str | None = None,
    cache: bool = True,
    dtype: torch.dtype = torch.float32,
    inline_bytes: int = INLINE_BYTES,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress = silent,
) -> Manifest:
    """Export ``checkpoint`` to the new directory ``out`` and check it against torch, where memory holds both.

    It is traced without its weights, and of these only what is kept is read, a piece at a time.

    Args:
        checkpoint: config.json and safetensors weights.
        out: a directory that does not exist.
        runner: runs the result.
        opset: of the graph.
        plan: which experts stay.
        prepare: changes the model before it is traced, as ``pruning.apply.apply_plan`` does for ``plan``.
        task: one of `tasks.TASKS`; by default what the architecture is made for.
        cache: whether decoders keep keys and values between calls (`moe_spec.decoder`).
        dtype: float32, float16 or bfloat16; routers stay float32.
        inline_bytes: smaller weights lie in the .onnx file.
        max_memory: bytes that the check against torch may take; None: what is free. Without it, the manifest says that
            nothing was compared, and why.
        trust_remote_code: run the Python files that config.json names (`models.own_code`); the manifest lists them.
        on_progress: told of the bytes that are hashed and written, and of the examples that are compared.

    Raises:
        UserError: no checkpoint, an unknown family or task, a decoder without a cache that can be an input, a plan for
            another model, or one that was not applied, or an output that exists.
        VerificationError: the exported graph does not compute what torch computes.
    """
    refuse_existing(out)
    identity = checkpoint_sha256(checkpoint, on_progress)
    if plan is not None:
        plan.require_model(identity, str(checkpoint))
    require_merging(plan, prepare)
    model, pieces = open_model(checkpoint, plan, prepare, trust_remote_code=trust_remote_code)
    called = task_of(type(model).__name__, task)
    if cache:
        with weightless(model, dtype):
            called = with_cache(called, model)
    read = sum(tensor.size for tensor in stored_tensors(checkpoint).values())

    def reference() -> PreTrainedModel:
        """``model`` with its weights, read as transformers reads them and not as they were bound."""
        is_there = not any(parameter.is_meta for parameter in model.parameters())
        return model if is_there else prepared(checkpoint, prepare, trust_remote_code=trust_remote_code)

    code = own_code(checkpoint) if trust_remote_code else {}
    opened = Opened(model, called, pieces, identity, reference, read, code, plan, checkpoint)
    return write(opened, out, runner, How(opset, dtype, inline_bytes, max_memory, task, cache), on_progress)
