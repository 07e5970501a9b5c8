"""What an export would write, without a weight that is read or a byte that is written."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from exporter.sources import Prepare
from exporter.tasks import Task, part_of, task_of, with_cache
from exporter.weightless import weightless
from exporter.write import block_of, memory_to_compare
from models.checkpoints import load_empty, stored_tensors
from models.moe_layers import find_moe_layers, tensors_of_routers
from models.spread import memory_for_weights
from moe_spec.identity import checkpoint_sha256
from moe_spec.manifest import BlockEntry
from moe_spec.plan import PruningPlan


@dataclasses.dataclass(frozen=True)
class Preview:
    """What is known before anything is done.

    Attributes:
        blocks: MoE layers with what is left of them, in model order.
        stored_bytes: of the checkpoint's weights.
        weight_bytes: of the weights that would be written, transposed ones as often as they are.
        compare_bytes: of memory that the check against torch would take.
        free_bytes: of memory that it may take.
    """

    blocks: tuple[BlockEntry, ...]
    stored_bytes: int
    weight_bytes: int
    compare_bytes: int
    free_bytes: int

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return dataclasses.asdict(self)


def preview(
    checkpoint: Path,
    *,
    plan: PruningPlan | None = None,
    prepare: Prepare | None = None,
    task: str | None = None,
    cache: bool = True,
    dtype: torch.dtype = torch.float32,
    max_memory: int | None = None,
    trust_remote_code: bool = False,
) -> Preview:
    """What `export` of the same arguments would write.

    Raises:
        UserError: no checkpoint, an unknown family or task, a decoder without a cache that can be an input, a plan for
            another model, or what ``prepare`` refuses.
    """
    if plan is not None:
        plan.require_model(checkpoint_sha256(checkpoint), str(checkpoint))
    stored = stored_tensors(checkpoint).values()
    model = load_empty(checkpoint, torch.float32, trust_remote_code=trust_remote_code)
    if prepare is not None:
        prepare(model)
    called = task_of(type(model).__name__, task)
    if cache:
        with weightless(model, dtype):
            with_cache(called, model)
    wide, values = tensors_of_routers(model), _values(model, called)
    weight_bytes = sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() and name not in wide else tensor.itemsize)
        for name, tensor in values.items()
    )
    return Preview(
        blocks=tuple(block_of(layer, plan, dtype) for layer in find_moe_layers(model)),
        stored_bytes=sum(tensor.nbytes for tensor in stored),
        weight_bytes=weight_bytes,
        compare_bytes=memory_to_compare(
            sum(tensor.size for tensor in stored), sum(tensor.numel() for tensor in values.values())
        ),
        free_bytes=memory_for_weights(max_memory),
    )


def _values(model: PreTrainedModel, task: Task) -> dict[str, Tensor]:
    """What is written of ``model``, by name: tied weights once, a head only where ``task`` has one."""
    called = {id(tensor) for tensor in part_of(model, task).state_dict(keep_vars=True).values()}
    tied, everything = model.all_tied_weights_keys, model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in everything.items() if name not in tied and id(tensor) in called}
