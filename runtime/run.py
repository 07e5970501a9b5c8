"""Batch inference: .npz, .jsonl and image files in, classes or raw outputs out."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.dataset import load_dataset, write_npz
from moe_spec.decoder import PRESENT, complete
from moe_spec.errors import UserError
from moe_spec.files import new_file, refuse_existing, require_file
from moe_spec.images import FILE_NAME as PREPROCESSOR
from moe_spec.images import ImagePreprocessor
from moe_spec.manifest import FILE_NAME, Manifest, TensorSpec
from moe_spec.progress import Progress, counted, silent
from moe_spec.record import parse_object
from moe_spec.runner import LOGITS, Arrays, Feeds
from runtime.backends import open_session
from runtime.engine import profiles_of
from runtime.execution import BY_DEFAULT, Execution
from runtime.inputs.image_files import SUFFIXES, find_images, read_images
from runtime.inputs.json_lines import SUFFIX as JSON_LINES
from runtime.inputs.json_lines import read_json_lines
from runtime.model_dir import home
from runtime.parity import softmax

INPUT = "an .npz, .jsonl or image file, or a folder of images"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model said of N examples.

    Attributes:
        names: of the examples: a path, with an index where the file holds several.
        outputs: (N, ...) by name; of an output without axes, such as a loss, a value for each batch.
        classes: name of the likeliest class of each example; None where the model does not classify.
        probabilities: (N, C) float64 softmax of the logits; None likewise.
    """

    names: tuple[str, ...]
    outputs: Mapping[str, npt.NDArray[Any]]
    classes: tuple[str, ...] | None
    probabilities: npt.NDArray[np.float64] | None

    def save(self, path: Path) -> None:
        """Write outputs, and ``classes`` and ``probabilities`` where there are any, to an .npz."""
        arrays = dict(self.outputs)
        if self.classes is not None and self.probabilities is not None:
            arrays |= {"classes": np.array(self.classes), "probabilities": self.probabilities}
        with new_file(path) as staging:
            write_npz(staging, arrays)


def run(
    model: Path,
    inputs: Sequence[Path],
    out: Path | None = None,
    batch_size: int = 32,
    *,
    threads: int = 0,
    execution: Execution = BY_DEFAULT,
    on_progress: Progress = silent,
) -> Predictions:
    """Run a model or an engine over files.

    Args:
        model: engine directory, model directory or .onnx file.
        inputs: .npz files (model inputs, or ``images`` for models with a preprocessor), .jsonl files (an example a
            line), PNG or JPEG files, and folders of such images.
        out: .npz to write; it must not exist yet.
        batch_size: examples that are run at once; of a model that takes more at least or fewer at most, as many as it
            takes. Where the last ones are too few for it, an example is repeated, and what it gives is left out.
        threads: that one operator may use on a CPU; 0 for one a core.
        execution: how ONNX Runtime is to run it.
        on_progress: told of every batch.

    Raises:
        UserError: a file is missing, broken or does not fit the model, or ``out`` exists or is no .npz.
    """
    if out is not None:
        refuse_existing(out)
        if out.suffix != ".npz":
            raise UserError(f"{out} is no .npz", hint=f"write to {out.with_suffix('.npz')}")
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}, expected 1 or more", hint="give --batch-size 1 or more")
    with open_session(model, threads, execution) as session:
        least, most = _batch_range(model, session.inputs)
        names: list[str] = []
        batches: list[Arrays] = []
        wanted = [spec.name for spec in session.outputs if not spec.name.startswith(PRESENT)]
        size = min(max(batch_size, least), most)
        for found, feeds in _batches(home(model), session.inputs, inputs, size, on_progress):
            names += found
            given = complete(session.inputs, _padded(feeds, least))
            batches.append(_without_padding(session.run(given, wanted), len(found), least))
    outputs = _concatenate(batches)
    labels = _labels(home(model))
    logits = outputs.get(LOGITS)
    predictions = Predictions(tuple(names), outputs, None, None)
    if labels is not None and logits is not None and logits.ndim == 2 and logits.shape[1] == len(labels):
        classes = tuple(labels[index] for index in logits.argmax(axis=1))
        predictions = dataclasses.replace(
            predictions, classes=classes, probabilities=softmax(logits.astype(np.float64))
        )
    if out is not None:
        predictions.save(out)
    return predictions


def _batch_range(model: Path, inputs: Sequence[TensorSpec]) -> tuple[int, int]:
    """How many examples a run takes at least and at most: by an engine's profiles, or as the graph has it."""
    profiles = profiles_of(Manifest.load(model)) if (model / FILE_NAME).is_file() else ()
    ranges = [(shapes.min[0], shapes.max[0]) for profile in profiles for shapes in profile.values() if shapes.min]
    fixed = {spec.shape[0] for spec in inputs if spec.shape}
    ranges = ranges or [(size, size) for size in fixed if isinstance(size, int) and len(fixed) == 1]
    return min((least for least, _ in ranges), default=1), max((most for _, most in ranges), default=sys.maxsize)


def _padded(feeds: Feeds, least: int) -> Feeds:
    """``feeds`` with the last example again where there are less than ``least``."""
    if len(next(iter(feeds.values()))) >= least:
        return feeds
    return {
        name: np.pad(array, ((0, least - len(array)), *((0, 0),) * (array.ndim - 1)), "edge")
        for name, array in feeds.items()
    }


def _without_padding(outputs: Arrays, examples: int, least: int) -> Arrays:
    """Of ``outputs`` of a padded batch the part of the ``examples``, each of which may have several rows."""
    if examples >= least:
        return outputs
    return {name: array[: len(array) * examples // least] if array.ndim else array for name, array in outputs.items()}


def _batches(
    directory: Path, specs: Sequence[TensorSpec], inputs: Sequence[Path], size: int, on_progress: Progress
) -> Iterator[tuple[list[str], Feeds]]:
    """Names of examples and what to feed for them: every file of data by itself, then the images together."""
    found = (find_images(path) if path.is_dir() else [require_file(path, INPUT)] for path in inputs)
    files = list(itertools.chain(*found))
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    preprocessor = ImagePreprocessor.load(directory) if images else None
    if images and preprocessor is None:
        raise UserError(
            f"{images[0]} is an image, but {directory} has no {PREPROCESSOR}",
            hint="give a model that takes images, or store model inputs in an .npz",
        )
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            for index, feeds in enumerate(_data(path, specs, directory, size, on_progress)):
                count = len(next(iter(feeds.values())))
                yield [f"{path}[{index * size + offset}]" for offset in range(count)], feeds
    starts = range(0, len(images), size)
    for start in counted(starts, "running images", len(starts), on_progress if images else silent):
        assert preprocessor is not None, "images were refused above"
        part = images[start : start + size]
        yield [str(path) for path in part], read_images(part, preprocessor)


def _data(
    path: Path, specs: Sequence[TensorSpec], directory: Path, size: int, on_progress: Progress
) -> Iterator[Feeds]:
    if path.suffix.lower() == JSON_LINES:
        return read_json_lines(path, specs, size, on_progress)
    data = load_dataset(path, directory)
    return counted(data.batches(size), f"running {path.name}", math.ceil(len(data) / size), on_progress)


def _concatenate(batches: Sequence[Arrays]) -> Arrays:
    """Outputs of all batches, examples on axis 0; on the axis of those that have none, batches."""
    if not batches:
        raise UserError("there is nothing to run", hint="give .npz, .jsonl or image files with --input")
    shapes = {name: {batch[name].shape[1:] for batch in batches} for name in batches[0]}
    ragged = sorted(name for name, found in shapes.items() if len(found) > 1)
    if ragged:
        raise UserError(
            f"the inputs give outputs of different shapes: {', '.join(ragged)}",
            hint="run files of one length at a time",
        )
    return {name: np.concatenate([np.atleast_1d(batch[name]) for batch in batches]) for name in batches[0]}


def _labels(directory: Path) -> list[str] | None:
    """Class names by id, from config.json; None where it names none, or not those from 0 on."""
    config = directory / "config.json"
    if not config.is_file():
        return None
    named = parse_object(config, config.read_bytes(), "export the model again").get("id2label")
    if not isinstance(named, dict) or not named:
        return None
    labels = [label for index in range(len(named)) if isinstance(label := named.get(str(index)), str)]
    return labels if len(labels) == len(named) else None
