"""A finished float32 model directory in low precision: graph and weights cast, routers observed anew, and proven."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from graph_passes.casts import cast_graph
from graph_passes.casts.assign import Formats
from graph_passes.casts.proof import CastProof, prove_casts
from graph_passes.describe import io_of, with_ids
from graph_passes.graph.emitter import Names
from graph_passes.graph.measure import measure, pass_entry
from graph_passes.model_file import load_graph, save_graph
from graph_passes.proof.choices import Watched
from graph_passes.proof.mask import save_observed
from graph_passes.readers import read_blocks
from graph_passes.record.block import MoEBlock
from moe_spec.errors import VerificationError
from moe_spec.manifest import MODEL, BlockEntry, PassEntry, TensorSpec
from moe_spec.runner import Runner


@dataclasses.dataclass(frozen=True)
class Cast:
    """What became of a model.

    Attributes:
        inputs: of the graph.
        outputs: likewise.
        blocks: its MoE layers.
        entry: what the pass did.
        proof: None where none was asked for.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    blocks: tuple[BlockEntry, ...]
    entry: PassEntry
    proof: CastProof | None


def cast_directory(
    directory: Path, blocks: Sequence[BlockEntry], formats: Formats, runner: Runner | None, scratch: Path
) -> Cast:
    """Put model.onnx and observed.onnx of ``directory``, which are float32, into ``formats``.

    Args:
        directory: holds nothing else; ``scratch`` takes what was there meanwhile.
        blocks: its MoE layers.
        formats: of experts and rest.
        runner: runs both for the proof; None: nothing is proven.
        scratch: a directory on the same file system.

    Raises:
        UserError: a router that is not recognised, an op whose types nobody knows, a weight beyond what float16 has.
        VerificationError: more differs than rounding explains, float16 overflows, or a layer is not read any more.
    """
    with tempfile.TemporaryDirectory(prefix=".float32.", dir=scratch) as name:
        wide = Path(name)
        for path in list(directory.iterdir()):
            path.rename(wide / path.name)
        before = measure(load_graph(wide / MODEL), wide)
        graph = cast_graph(wide / MODEL, formats, [block.name for block in blocks if block.form == "ffn"])
        save_graph(graph, wide, directory / MODEL)
        after = measure(graph, directory)
        inputs, outputs = io_of(graph)
        read = with_ids(read_blocks(graph, directory).blocks, blocks)
        _check_read(read, blocks)
        observed = save_observed(graph, Names(graph), read, [None] * len(read), directory)
        by_name = {entry.name: entry for entry in observed}
        watched = [
            Watched(
                entry, entry, tuple(range(entry.experts)), block.router.groups is None and block.router.capacity is None
            )
            for block, entry in zip(read, observed, strict=True)
            if entry.gates is not None
        ]
        proof = None if runner is None else prove_casts(wide, directory, watched, formats, runner, scratch)
    return Cast(
        inputs,
        outputs,
        tuple(by_name.get(block.name, block) for block in blocks),
        pass_entry("cast-floats", True, before, after),
        proof,
    )


def _check_read(read: Sequence[MoEBlock], blocks: Sequence[BlockEntry]) -> None:
    """Whatever is written is read again, as by whoever prunes the result."""
    known = {block.name for block in read}
    lost = next((block.name for block in blocks if block.router and block.name not in known), None)
    if lost is not None:
        raise VerificationError(f"layer {lost} is not recognised any more once it is cast; nothing was written")
