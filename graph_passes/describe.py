"""What a model is: its graph, its MoE blocks or why they were refused, its place in the chain of hashes."""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graph_passes.model_file import load_model, model_path
from graph_passes.readers import read_blocks
from graph_passes.record.block import MoEBlock, Unrecognised
from graph_passes.unreachable import Findings, find_unreachable
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import EXPERT_CHOICE, FILE_NAME, BlockEntry, Manifest, PassEntry, TensorSpec

TOOLS = ("moe-edge", "onnx", "onnx-graphsurgeon")


@dataclasses.dataclass(frozen=True)
class Model:
    """An ONNX model with its MoE blocks.

    Attributes:
        path: the .onnx file.
        graph: its graph; weights stay on disk.
        blocks: the MoE layers that were recognised, in graph order.
        unrecognised: those that no reader takes, and why.
        manifest: of the directory, if it has one.
        identity: of the model at the start of the chain; gigabytes are hashed while the graph is worked on.
        passes: what was done to the graph before it was read.
        reduced: whether what can never run is gone from the graph already.
        findings: for each block, the experts that no input can choose.
    """

    path: Path
    graph: gs.Graph
    blocks: tuple[MoEBlock, ...]
    unrecognised: tuple[Unrecognised, ...]
    manifest: Manifest | None
    identity: Future[str]
    passes: tuple[PassEntry, ...]
    reduced: bool
    findings: tuple[Findings, ...]

    @property
    def source_sha256(self) -> str:
        """Identity of the model at the start of the chain."""
        return self.identity.result()

    @property
    def model_sha256(self) -> str:
        """Identity of this model, which plans and statistics carry."""
        return self.source_sha256 if self.manifest is None else self.manifest.model_sha256

    @property
    def parent_sha256(self) -> str:
        """Hash of the manifest, or of the ONNX file where there is none."""
        return self.source_sha256 if self.manifest is None else sha256_file(self.path.parent / FILE_NAME)

    @property
    def settled(self) -> tuple[BlockEntry, ...]:
        """Layers of the manifest that are no MoE layers any more: one expert was left, and no top-k."""
        names = {block.name for block in self.blocks}
        entries = () if self.manifest is None else self.manifest.blocks
        return tuple(entry for entry in entries if entry.experts == 1 and entry.name not in names)

    @property
    def choosing(self) -> tuple[BlockEntry, ...]:
        """Layers of the manifest whose experts choose their tokens: no reader takes them."""
        entries = () if self.manifest is None else self.manifest.blocks
        return tuple(entry for entry in entries if entry.form == EXPERT_CHOICE)


def inspect_model(path: Path) -> Model:
    """Read an ONNX file or model directory, recognised or not.

    Raises:
        UserError: no ONNX model, or weights that are missing or cut.
    """
    file = model_path(path)
    manifest = Manifest.load(file.parent) if (file.parent / FILE_NAME).is_file() else None
    loaded = load_model(file)
    identity = _identify(file, loaded.locations, manifest)
    graph = loaded.graph
    reading = read_blocks(graph, file.parent)
    blocks = with_ids(reading.blocks, () if manifest is None else manifest.blocks)
    return Model(
        path=file,
        graph=graph,
        blocks=blocks,
        unrecognised=reading.unrecognised,
        manifest=manifest,
        identity=identity,
        passes=loaded.passes,
        reduced=loaded.reduced,
        findings=tuple(find_unreachable(block, file.parent) for block in blocks),
    )


def _identify(file: Path, locations: Sequence[str], manifest: Manifest | None) -> Future[str]:
    """Hash the model in a thread that nobody waits for at an early end; where a manifest knows, take its word."""
    identity: Future[str] = Future()
    if manifest is not None:
        identity.set_result(manifest.source_sha256)
        return identity

    def work() -> None:
        try:
            identity.set_result(onnx_sha256(file, locations))
        except (OSError, UserError) as error:
            identity.set_exception(error)

    Thread(target=work, daemon=True).start()
    return identity


def read_model(path: Path, *, allow_partial: bool = False) -> Model:
    """Read an ONNX file or model directory whose every MoE layer is recognised.

    Raises:
        UserError: a layer was refused (unless ``allow_partial``), there is none at all, or experts choose.
    """
    model = inspect_model(path)
    if model.choosing:
        raise UserError(
            f"{model.path}: in layer {model.choosing[0].name} experts choose their tokens, which no reader takes",
            hint="plan for the checkpoint, and export what is left: moe-edge export CHECKPOINT --plan plan.json; "
            "targets take it as it is",
        )
    if model.unrecognised and not allow_partial:
        found = "\n".join(str(layer) for layer in model.unrecognised)
        raise UserError(
            f"{model.path}: {len(model.unrecognised)} MoE layer(s) not recognised\n{found}",
            hint="--allow-partial leaves these layers as they are",
        )
    if not (model.blocks or model.settled or model.unrecognised):
        raise UserError(
            f"{model.path} has no MoE layer",
            hint="give a model with routed experts; `moe-edge inspect` shows what it has",
        )
    return model


def with_ids(blocks: Sequence[MoEBlock], entries: Sequence[BlockEntry]) -> tuple[MoEBlock, ...]:
    """The blocks with the names and ids that they have in the source model, as the manifest says.

    Where the graph has lost its names, blocks are counted, and a layer that has become a plain FFN counts no more.
    """
    ranked = [entry for entry in entries if entry.experts > 1]
    if [entry.experts for entry in ranked] == [block.num_experts for block in blocks]:
        named = zip(blocks, ranked, strict=True)
        return tuple(dataclasses.replace(block, name=entry.name, keep=entry.keep) for block, entry in named)
    known = {(entry.name, entry.experts): entry for entry in entries}
    found = [(block, known.get((block.name, block.num_experts))) for block in blocks]
    return tuple(block if entry is None else dataclasses.replace(block, keep=entry.keep) for block, entry in found)


def entry_of(block: MoEBlock, gates: str | None = None, scores: str | None = None) -> BlockEntry:
    """The block as it stands in a manifest; ``gates`` and ``scores`` are the outputs that observe its router."""
    return BlockEntry(
        name=block.name,
        experts=block.num_experts,
        top_k=block.router.top_k,
        keep=block.keep,
        router=block.router.kind,
        form=block.form,
        bytes=block.nbytes,
        gates=gates,
        scores=scores,
    )


def io_of(graph: gs.Graph) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of ``graph``."""
    return tuple(_spec(tensor) for tensor in graph.inputs), tuple(_spec(tensor) for tensor in graph.outputs)


def _spec(tensor: gs.Tensor) -> TensorSpec:
    dtype = tensor.dtype if not isinstance(tensor.dtype, int) else onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype)
    shape = tuple(f"{tensor.name}_{axis}" if dim is None else dim for axis, dim in enumerate(tensor.shape or ()))
    return TensorSpec(tensor.name, np.dtype(dtype).name, shape)


def tool_versions() -> dict[str, str]:
    """Versions of what rewrites graphs."""
    return {name: importlib.metadata.version(name) for name in TOOLS}
