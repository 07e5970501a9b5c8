"""The two models that `verify` compares, open and checked against each other."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.dataset import Dataset
from moe_spec.decoder import complete
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.manifest import FILE_NAME, BlockEntry, Manifest, TensorSpec
from moe_spec.progress import Progress, silent
from moe_spec.runner import Arrays, Feeds
from runtime.backend import Session
from runtime.backends import engine_backend, open_session
from runtime.execution import BY_DEFAULT, Execution
from runtime.inputs.feeds import check_feeds
from runtime.inputs.random_feeds import RANDOM_SHAPES, RandomFeeds, is_floating
from runtime.model_dir import model_file, observed_file
from runtime.onnx_file import check_external_data, number_formats
from runtime.parity import Routing
from runtime.verification.tolerances import TOLERANCES, coarsest

OTHER_REFERENCE = "give the model that the candidate was made from as --reference"


@dataclasses.dataclass(frozen=True)
class Side:
    """A model directory with its observed outputs, or an engine, which has none.

    Attributes:
        path: the directory.
        manifest: of the directory, every file of which was hashed.
        session: open; the caller closes it.
        observed: whether the session shows what the routers did.
    """

    path: Path
    manifest: Manifest
    session: Session
    observed: bool

    @classmethod
    def open(
        cls, path: Path, threads: int, execution: Execution = BY_DEFAULT, on_progress: Progress = silent
    ) -> "Side":
        """Open ``path``, once its files were hashed; ``on_progress`` is told of their bytes.

        Raises:
            UserError: it is no directory with a manifest, it is damaged, or it cannot run here.
        """
        if not path.is_dir():
            raise UserError(
                f"{path} is no model or engine directory",
                hint="give a directory that `moe-edge export`, `optimize` or `build` wrote",
            )
        manifest = Manifest.load(path)
        observed = engine_backend(path) is None
        if observed:  # engines are checked where they are opened, with the command that rebuilds them
            manifest.check_files(path, on_progress)
        session = open_session(observed_file(path) if observed else path, threads, execution)
        return cls(path, manifest, session, observed)

    @property
    def sha256(self) -> str:
        """Hash of the manifest; of a checkpoint, which has none, that of the model."""
        if not (self.path / FILE_NAME).is_file():
            return self.manifest.model_sha256
        return sha256_file(self.path / FILE_NAME)

    def precision(self) -> str:
        """The number format that decides how exact this model can be."""
        return precision_of(self.path, self.manifest)

    def routing(self, block: BlockEntry, outputs: Arrays, tokens: int, experts: int) -> Routing:
        """What ``block`` did with ``tokens`` tokens, over ``experts`` experts of the source model."""
        if block.gates is None or block.scores is None:
            return Routing.of_one_expert(tokens, block.keep, experts)
        return Routing.of(outputs[block.gates], outputs[block.scores], block.keep, experts)


def precision_of(directory: Path, manifest: Manifest) -> str:
    """The row of `runtime.verification.tolerances` that a model directory or an engine is judged by.

    It is that of the coarsest number format: of the experts where they are quantised.

    Raises:
        UserError: the graph is broken, or in a format of which no tolerance is told beforehand.
    """
    known = manifest.details.get("number_formats")
    formats = number_formats(check_external_data(model_file(directory))) if known is None else list(known)
    asked = manifest.details.get("precision") or {}  # bytes of two 4-bit numbers are not told from others
    formats += [asked[part] for part in ("experts", "rest") if asked.get(part) in TOLERANCES]
    if manifest.details.get("activations"):
        formats.append("w8a8")
    return coarsest(name.removeprefix("u") for name in formats)


Batch = tuple[Feeds, npt.NDArray[np.int64] | None]
"""Feeds, and the labels of their examples, if any."""


def batches_of(inputs: Sequence[TensorSpec], directory: Path, data: Dataset | None, size: int) -> Iterator[Batch]:
    """``size`` examples of ``data`` at a time; without it random ones at three shapes, for a model in ``directory``.

    Raises:
        UserError: ``data`` does not fit the inputs.
    """
    if data is None:
        yield from ((feeds, None) for feeds in RandomFeeds.of(inputs, directory).three_shapes())
        return
    for index, feeds in enumerate(data.batches(size)):
        labels = None if data.labels is None else data.labels[index * size : (index + 1) * size]
        completed = complete(inputs, feeds)
        check_feeds(inputs, cast_to(inputs, completed), data.name)  # of two models, each casts for itself
        yield completed, labels


def count_batches(data: Dataset | None, size: int) -> int:
    """How many `batches_of` gives.

    >>> count_batches(None, 32)
    3
    """
    return len(RANDOM_SHAPES) if data is None else math.ceil(len(data) / size)


def run_cast(session: Session, feeds: Feeds, outputs: Sequence[str] | None = None) -> Arrays:
    """Outputs of ``session``, those asked for or all; floating inputs are given in the format that the model takes."""
    return session.run(cast_to(session.inputs, feeds), outputs)


def cast_to(inputs: Sequence[TensorSpec], feeds: Feeds) -> Feeds:
    """``feeds`` with floating inputs in the format that the model takes."""
    formats = {spec.name: np.dtype(spec.dtype) for spec in inputs}
    return {name: _cast(array, formats.get(name, array.dtype)) for name, array in feeds.items()}


def check_comparable(reference: Side, candidate: Side) -> None:
    """Refuse to compare models that do not do the same thing.

    Raises:
        UserError: inputs, outputs or layers differ, or the candidate has experts that the reference lacks.
    """
    mine, theirs = reference.manifest, candidate.manifest
    for what, ours, others in (
        ("inputs", _names(mine.inputs), _names(theirs.inputs)),
        ("outputs", _names(mine.outputs), _names(theirs.outputs)),
        ("MoE layers", [block.name for block in mine.blocks], [block.name for block in theirs.blocks]),
    ):
        if ours != others:
            raise UserError(
                f"{candidate.path} has the {what} {', '.join(others)}, its reference {', '.join(ours)}",
                hint=OTHER_REFERENCE,
            )
    for our_block, their_block in zip(mine.blocks, theirs.blocks, strict=True):
        foreign = sorted(set(their_block.keep) - set(our_block.keep))
        if foreign:
            raise UserError(
                f"layer {their_block.name} of {candidate.path} has the experts {foreign}, which its reference lacks",
                hint=OTHER_REFERENCE,
            )


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]


def _cast(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return array.astype(dtype, copy=False) if is_floating(array.dtype) and is_floating(dtype) else array
