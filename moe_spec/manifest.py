"""manifest.json: what a model directory holds, what was done to it, and the hash of what it was made from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_spec.errors import UserError
from moe_spec.files import inside, sha256_file, sha256_files
from moe_spec.plan import PruningPlan
from moe_spec.progress import Progress, silent
from moe_spec.record import Json, Record, load_record, save_record

SCHEMA = 1
FILE_NAME = "manifest.json"
MODEL = "model.onnx"
OBSERVED = "observed.onnx"
OBSERVED_CPU = "observed.cpu.onnx"
"""`OBSERVED` in ops that ONNX Runtime has on a CPU, where it lacks one for their format; weights are shared."""
_REMAKE = "make the directory again with the command that made it"


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of the directory."""

    name: str
    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output: ``shape`` holds ints and the names of dynamic axes; ``dtype`` is numpy's name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


EXPERT_CHOICE = "expert_choice"
"""The form of a layer whose experts choose their tokens, as `export` writes it: no reader takes it, any target does."""


@dataclasses.dataclass(frozen=True)
class BlockEntry:
    """One MoE layer as it stands in the graph.

    Attributes:
        name: path of the MoE block in the model.
        experts: E of this graph.
        top_k: K of this graph.
        keep: for each expert its id in the source model, ascending.
        router: kind of router, e.g. ``softmax, top-k``; empty where none is left.
        form: the ONNX form of the experts: ``experts`` (one node), ``dense``, ``sorted``, ``gather``, ``ffn``;
            or `EXPERT_CHOICE`.
        bytes: bytes of the router's and the experts' weights.
        gates: output of ``observed.onnx`` with the gates (T, E), 0 where not selected; None without a router.
        scores: output of ``observed.onnx`` with what top-k ranks (T, E), -inf where excluded; None without a router.
            Where more rows of the router are ranked than lead to an expert, theirs stand behind those of the experts.
    """

    name: str
    experts: int
    top_k: int
    keep: tuple[int, ...]
    router: str
    form: str
    bytes: int
    gates: str | None = None
    scores: str | None = None


@dataclasses.dataclass(frozen=True)
class PassEntry:
    """What one graph pass did."""

    name: str
    modified: bool
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a model directory; from an engine back to the checkpoint it is one chain of hashes.

    Attributes:
        kind: ``exported``, ``optimized`` or ``engine``.
        source_sha256: identity of the model at the start of the chain (a checkpoint, or a foreign ONNX file).
        model_sha256: identity of this one, which plans and statistics carry: the same while all experts are there, and
            ``moe_spec.identity.pruned_sha256`` of it once some are gone.
        parent_sha256: hash of the parent's manifest.json; of the checkpoint or ONNX file where there is none.
        files: every file of the directory but the manifest.
        inputs: of ``model.onnx`` or of the engine.
        outputs: likewise.
        blocks: MoE layers in model order.
        plan: the plan that was applied, if one was.
        passes: the graph passes that ran, in order.
        tools: versions of what made the directory.
        details: what only this kind has: the oracle's errors, an engine's target and profiles.
    """

    kind: str
    source_sha256: str
    parent_sha256: str
    files: tuple[FileEntry, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    blocks: tuple[BlockEntry, ...] = ()
    model_sha256: str = ""
    plan: PruningPlan | None = None
    passes: tuple[PassEntry, ...] = ()
    tools: Mapping[str, str] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model_sha256:
            object.__setattr__(self, "model_sha256", self.source_sha256)

    @property
    def modified(self) -> bool:
        """Whether any graph pass changed anything."""
        return any(entry.modified for entry in self.passes)

    def to_json(self) -> Json:
        """The manifest as it stands in manifest.json."""
        return dataclasses.asdict(self) | {"plan": None if self.plan is None else self.plan.to_json()}

    def save(self, directory: Path) -> None:
        """Write ``directory/manifest.json``."""
        save_record(directory / FILE_NAME, "manifest", SCHEMA, self.to_json())

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read ``directory/manifest.json``.

        Raises:
            UserError: it is missing, cut, another artifact, or of another schema.
        """
        record = load_record(directory / FILE_NAME, "manifest", SCHEMA, _REMAKE)
        plan = record.record("plan")
        return cls(
            kind=record.take("kind", str),
            source_sha256=record.take("source_sha256", str),
            parent_sha256=record.take("parent_sha256", str),
            files=tuple(entry.row(FileEntry) for entry in record.records("files")),
            inputs=tuple(_tensor(entry) for entry in record.records("inputs")),
            outputs=tuple(_tensor(entry) for entry in record.records("outputs")),
            blocks=tuple(entry.row(BlockEntry) for entry in record.records("blocks")),
            model_sha256=record.take("model_sha256", str, default=""),
            plan=None if plan is None else PruningPlan.from_record(plan),
            passes=tuple(entry.row(PassEntry) for entry in record.records("passes")),
            tools=record.take("tools", dict),
            details=record.take("details", dict),
        )

    def check_files(self, directory: Path, on_progress: Progress = silent) -> None:
        """Compare the directory with the manifest; ``on_progress`` is told of the bytes.

        Raises:
            UserError: a file is missing, cut, or not the one that the manifest describes.
        """
        paths = [inside(directory, entry.name, directory / FILE_NAME) for entry in self.files]
        for path, entry in zip(paths, self.files, strict=True):
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise UserError(f"{path} is missing, {FILE_NAME} lists it", hint=_REMAKE)
            if size != entry.bytes:
                raise UserError(f"{path} has {size} bytes, {FILE_NAME} says {entry.bytes}", hint=_REMAKE)
        for path, entry, found in zip(paths, self.files, sha256_files(paths, on_progress), strict=True):
            if found != entry.sha256:
                raise UserError(f"{path} is not the file that {FILE_NAME} describes (sha256 differs)", hint=_REMAKE)


def list_files(directory: Path, known: Mapping[str, str] | None = None) -> tuple[FileEntry, ...]:
    """An entry for every file in ``directory`` but the manifest, by name; ``known`` hashes are not computed again."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != FILE_NAME)
    hashes, entries = known or {}, []
    for path in paths:
        name = path.relative_to(directory).as_posix()
        entries.append(FileEntry(name, hashes.get(name) or sha256_file(path), path.stat().st_size))
    return tuple(entries)


def _tensor(record: Record) -> TensorSpec:
    return TensorSpec(record.take("name", str), record.take("dtype", str), tuple(record.take("shape", list)))
