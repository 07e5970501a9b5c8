"""Task data: an .npz of model inputs or of images, with or without labels."""

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError
from moe_spec.files import require_file, sha256_file
from moe_spec.images import ImagePreprocessor

IMAGES = "images"
LABELS = "labels"
MASK = "attention_mask"
"""1 where a token counts, 0 where it is padding."""

MAX_BYTES = 8 << 30
"""What an .npz may unpack to; checked before anything is allocated."""

_UNREADABLE = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError, MemoryError)
"""What zipfile and numpy raise about cut, spoilt, encrypted or lying archives."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples of a task.

    Attributes:
        feeds: model inputs by name, each with examples on axis 0.
        labels: (N,) int64 class of each example, or None.
        sha256: hash of the file.
        name: what errors call it.
    """

    feeds: Mapping[str, npt.NDArray[Any]]
    labels: npt.NDArray[np.int64] | None
    sha256: str
    name: str = "the data"

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))

    def batches(self, size: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of ``size`` examples each; the last may be smaller.

        >>> data = Dataset({"x": np.arange(5)}, None, "")
        >>> [batch["x"].tolist() for batch in data.batches(2)]
        [[0, 1], [2, 3], [4]]
        """
        for start in range(0, len(self), size):
            yield {name: array[start : start + size] for name, array in self.feeds.items()}

    def part(self, start: int, stop: int) -> "Dataset":
        """The examples from ``start`` up to, not with, ``stop``.

        >>> Dataset({"x": np.arange(5)}, None, "").part(1, 3).feeds["x"].tolist()
        [1, 2]
        """
        labels = None if self.labels is None else self.labels[start:stop]
        feeds = {name: array[start:stop] for name, array in self.feeds.items()}
        return dataclasses.replace(self, feeds=feeds, labels=labels)

    def first(self, count: int) -> "Dataset":
        """The first ``count`` examples."""
        return self.part(0, count)


def load_dataset(path: Path, *models: Path, limit: int | None = None) -> Dataset:
    """Read an .npz: arrays named like the model's inputs, or ``images`` (uint8, preprocessed here), and ``labels``.

    Args:
        path: of the .npz.
        models: that it is for, directories or files in them. Where it holds images, the first that has a
            preprocessor_config.json says what becomes of them; without images none is read.
        limit: only the first so many examples are taken.

    Raises:
        UserError: no .npz, cut, pickled objects inside, too large, empty, of unequal lengths, or images without
            a preprocessor.
    """
    arrays = _read(require_file(path, "task data (.npz)"))
    labels = arrays.pop(LABELS, None)
    if IMAGES in arrays:
        preprocessors = map(ImagePreprocessor.load, models)
        preprocessor = next((found for found in preprocessors if found is not None), None)
        if preprocessor is None:
            raise UserError(
                f"{path} holds images, but the model has no preprocessor_config.json",
                hint="put preprocessor_config.json beside the model, or store model inputs in the .npz",
            )
        arrays["pixel_values"] = preprocessor(arrays.pop(IMAGES), str(path))
    lengths = {name: len(array) for name, array in arrays.items() if array.ndim > 0}
    if not lengths or len(lengths) < len(arrays) or len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise UserError(
            f"{path} holds examples {lengths}, expected arrays with the same number of examples, at least one",
            hint="store one array a model input, examples on axis 0",
        )
    examples = next(iter(lengths.values()))
    if labels is not None and (labels.shape != (examples,) or labels.dtype.kind not in "iu"):
        raise UserError(
            f"{path} holds {labels.dtype}{list(labels.shape)} labels for {examples} examples",
            hint="store one integer class an example in `labels`",
        )
    dataset = Dataset(arrays, None if labels is None else labels.astype(np.int64), sha256_file(path), str(path))
    return dataset if limit is None else dataset.first(limit)


def write_npz(path: Path, arrays: Mapping[str, npt.NDArray[Any]], compression: int = zipfile.ZIP_DEFLATED) -> None:
    """What numpy.savez_compressed writes, whatever the arrays are called: that has arguments called ``file``."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    hint = "write it with numpy.savez_compressed; pickled objects are never read"
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_BYTES:
            raise UserError(f"{path} unpacks to {unpacked} bytes, more than {MAX_BYTES}", hint="split the data")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except _UNREADABLE as error:
        raise UserError(f"{path} is no readable .npz: {error}", hint=hint) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy hands out other members of the archive as bytes
            raise UserError(f"{path} is no readable .npz: {name!r} is no array", hint=hint)
    return arrays
