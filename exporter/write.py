"""A model that was opened to a model directory: traced, saved, checked against torch, and told of in a manifest."""

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import torch
from transformers import PreTrainedModel

from exporter.bind import Pieces, bytes_of, save
from exporter.check import check_axes, check_experts, check_parity
from exporter.experts import NODE, form_of
from exporter.sources import APPLY
from exporter.tasks import Task
from exporter.trace import trace
from exporter.weightless import Traced
from models.moe_layers import MoELayer, find_moe_layers
from models.spread import memory_for_weights
from moe_spec.companions import copy_companions
from moe_spec.errors import UserError
from moe_spec.external_data import INLINE_BYTES
from moe_spec.files import new_directory
from moe_spec.identity import pruned_sha256
from moe_spec.layer_plan import ALIAS
from moe_spec.manifest import MODEL, BlockEntry, FileEntry, Manifest, TensorSpec, list_files
from moe_spec.plan import PruningPlan
from moe_spec.progress import Progress, silent
from moe_spec.record import Json
from moe_spec.runner import Runner

OPSET = 20
"""The last one before ONNX moved what TensorRT and ORT parse everywhere: Gelu is in, Attention (23) is not."""

FLOAT32_BYTES = 4

TOOLS = ("moe-edge", "torch", "transformers", "onnx", "onnxscript")


@dataclasses.dataclass(frozen=True)
class Opened:
    """What is exported.

    Attributes:
        model: may be without values.
        task: how it is called.
        pieces: its values.
        sha256: identity of the model with all its experts.
        reference: gives the model with its values, in float32, to compare with.
        read: how many values ``reference`` reads into memory.
        code: the Python files of the checkpoint's own that define the model, with their sha256.
        plan: which experts stayed.
        beside: a directory whose tokenizers and preprocessors travel along.
    """

    model: PreTrainedModel
    task: Task
    pieces: Pieces
    sha256: str
    reference: Callable[[], PreTrainedModel]
    read: int = 0
    code: Mapping[str, str] = dataclasses.field(default_factory=dict)
    plan: PruningPlan | None = None
    beside: Path | None = None


@dataclasses.dataclass(frozen=True)
class How:
    """How it is written; each is an argument of `export`."""

    opset: int = OPSET
    dtype: torch.dtype = torch.float32
    inline_bytes: int = INLINE_BYTES
    max_memory: int | None = None
    task: str | None = None
    cache: bool = True


def write(opened: Opened, out: Path, runner: Runner, how: How = How(), on_progress: Progress = silent) -> Manifest:
    """Trace what was opened, save it to the new directory ``out``, and check it against torch.

    Args:
        opened: the model, as its plan has left it.
        out: a directory that does not exist.
        runner: runs the result.
        how: of the graph, of its weights, and of the check.
        on_progress: told of the bytes that are hashed and written, and of the examples that are compared.

    Raises:
        UserError: the model cannot be traced, a plan that was not applied, or an output that exists.
        VerificationError: the exported graph does not compute what torch computes.
    """
    layers = find_moe_layers(opened.model)
    blocks = tuple(block_of(layer, opened.plan, how.dtype) for layer in layers)
    noded = [layer for layer in layers if form_of(layer) == NODE]
    on_progress("tracing")
    traced = trace(opened.model, opened.task, noded, how.opset, how.dtype)
    check_experts(traced.proto, noded)
    check_axes(traced.proto, opened.task)
    with new_directory(out) as staging:
        path = staging / MODEL
        hashes = save(traced, opened.pieces, path, inline_bytes=how.inline_bytes, on_progress=on_progress)
        compared = _compared(opened, traced, path, runner, how, on_progress)
        opened.model.config.save_pretrained(staging)
        if opened.beside is not None:
            copy_companions(opened.beside, staging)
        manifest = _manifest(
            opened, traced, blocks, list_files(staging, hashes), _details(opened, traced, how) | compared
        )
        manifest.save(staging)
    return manifest


def _compared(opened: Opened, traced: Traced, path: Path, runner: Runner, how: How, on_progress: Progress) -> Json:
    """What the manifest says of the check against torch, or why there was none."""
    too_large = _too_large(opened.read, traced, how.max_memory)
    if too_large is not None:
        return {"parity_with_torch": [], "not_compared": too_large}
    on_progress("loading the checkpoint in torch")
    return {"parity_with_torch": check_parity(opened.reference(), opened.task, path, runner, how.dtype, on_progress)}


def _details(opened: Opened, traced: Traced, how: How) -> Json:
    """What else the manifest says."""
    return {
        "opset": how.opset,
        "dtype": str(how.dtype).removeprefix("torch."),
        "task": how.task,
        "cache": how.cache,
        "external_data": how.inline_bytes,
        "bound": {"weights": len(traced.parameters), "bytes": bytes_of(traced)},
        **({"own_code": dict(opened.code)} if opened.code else {}),
    }


def _manifest(
    opened: Opened, traced: Traced, blocks: tuple[BlockEntry, ...], files: tuple[FileEntry, ...], details: Json
) -> Manifest:
    plan, identity = opened.plan, opened.sha256
    return Manifest(
        kind="exported",
        source_sha256=identity,
        parent_sha256=identity,
        files=files,
        inputs=tuple(_spec(value) for value in traced.proto.graph.input),
        outputs=tuple(_spec(value) for value in traced.proto.graph.output),
        blocks=blocks,
        model_sha256=identity if plan is None else _pruned_sha256(identity, plan, blocks),
        plan=plan,
        tools={name: importlib.metadata.version(name) for name in TOOLS},
        details=details,
    )


def _pruned_sha256(source_sha256: str, plan: PruningPlan, blocks: Sequence[BlockEntry]) -> str:
    """As `optimize` would have called it, had it carried out the plan."""
    if not any(layer.dropped for layer in plan.layers):
        return source_sha256
    return pruned_sha256(source_sha256, {block.name: block.keep for block in blocks})


def memory_to_compare(read: int, exported: int) -> int:
    """Bytes of memory that a comparison with torch takes, for so many values that are read and that are in the graph.

    The model of torch is there in float32, and the graph's weights three times: as a file that ONNX Runtime maps, as
    its definition of experts transposes them, and as it packs matrices.

    >>> memory_to_compare(1_000_000, 250_000)
    7000000
    """
    return FLOAT32_BYTES * (read + 3 * exported)


def _too_large(read: int, traced: Traced, max_memory: int | None) -> str | None:
    """Why the export cannot be compared with torch here, if it cannot."""
    graph = sum(math.prod(tensor.dims) for tensor in traced.proto.graph.initializer)
    needed, there = memory_to_compare(read, graph), memory_for_weights(max_memory)
    if needed <= there:
        return None
    return f"torch and ONNX Runtime together need {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB may be used"


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(value.name, dtype, dims)


def block_of(layer: MoELayer, plan: PruningPlan | None, dtype: torch.dtype) -> BlockEntry:
    """A MoE layer as the manifest has it, its experts in ``dtype``; routers stay float32.

    Raises:
        UserError: ``plan`` was not applied to it.
    """
    planned = None if plan is None else plan.layer(layer.name)
    if planned is not None and planned.router == ALIAS:
        planned = None  # merged experts are equal, and as many as ever
    keep = tuple(range(layer.num_experts)) if planned is None else planned.keep
    if len(keep) != layer.num_experts:
        raise UserError(
            f"the plan keeps {len(keep)} experts in layer {layer.name}, but {layer.num_experts} are to be exported",
            hint=APPLY,
        )
    of_router = (*layer.router.parameters(), *layer.router.buffers())
    weights = sum(parameter.numel() for parameter in layer.experts.parameters())
    return BlockEntry(
        name=layer.name,
        experts=layer.num_experts,
        top_k=layer.top_k,
        keep=keep,
        router=type(layer.router).__name__,
        form=form_of(layer),
        bytes=sum(tensor.nbytes for tensor in of_router) + weights * dtype.itemsize,
    )
