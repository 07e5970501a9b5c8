"""JSON lines to what a model takes: an example a line, each of the model's inputs by its name, as lists of numbers."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError
from moe_spec.files import require_file
from moe_spec.manifest import TensorSpec
from moe_spec.progress import Progress, silent
from moe_spec.record import parse_object
from moe_spec.runner import Arrays

SUFFIX = ".jsonl"

MAX_LINE = 64 << 20
"""Bytes of a line; checked before it is parsed, which takes many times as much."""

_PASS = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}
"""Kinds of numbers that become those of an input without a loss."""

_HINT = 'write a JSON object a line, such as {"input_ids": [5, 7, 2]}; long examples go into an .npz'


def read_json_lines(
    path: Path, inputs: Sequence[TensorSpec], size: int, on_progress: Progress = silent
) -> Iterator[Arrays]:
    """Feeds of ``size`` examples each, the last may be smaller; never more than these are in memory.

    A line has no axis of examples: ``{"input_ids": [5, 7, 2]}`` for an input ``input_ids`` (N, 3). Blank lines
    do not count.

    Args:
        path: the file.
        inputs: of the model; they say which numbers are taken.
        size: examples of one batch.
        on_progress: told of the bytes that are read.

    Raises:
        UserError: no such file, no example in it, a line that is too long or no JSON object, numbers that the input
            does not take, or other names or shapes than the first line has.
    """
    known = {spec.name: spec for spec in inputs}
    examples = _examples(require_file(path, f"examples ({SUFFIX})"), known, on_progress)
    while batch := list(itertools.islice(examples, size)):
        yield {name: np.stack([example[name] for example in batch]) for name in batch[0]}


def _examples(path: Path, inputs: Mapping[str, TensorSpec], on_progress: Progress) -> Iterator[Arrays]:
    first: dict[str, list[int]] | None = None
    size = path.stat().st_size
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path} line {number}"
            on_progress(f"running {path.name}", file.tell(), size)
            if len(line) > MAX_LINE:
                raise UserError(f"{where} has more than {MAX_LINE} bytes", hint=_HINT)
            if not line.strip():
                continue
            values = parse_object(where, line, _HINT)
            if not values:
                raise UserError(f"{where} names no input", hint=_HINT)
            example = {name: _array(value, inputs.get(name), name, where) for name, value in values.items()}
            shapes = {name: list(array.shape) for name, array in example.items()}
            first = first or shapes
            if shapes != first:
                raise UserError(
                    f"{where} holds {shapes}, the first one {first}", hint="run examples of one length at a time"
                )
            yield example
    if first is None:
        raise UserError(f"{path} holds no example", hint=_HINT)


def _array(value: Any, spec: TensorSpec | None, name: str, where: str) -> npt.NDArray[Any]:
    """``value`` as the input takes it, for one example."""
    if spec is None:
        raise UserError(f"{where}: the model has no input {name!r}", hint="name the lists like the model's inputs")
    wanted = np.dtype(spec.dtype)
    try:
        found = np.asarray(value)
        if found.size and found.dtype.kind in _PASS.get(wanted.kind, ""):
            return np.asarray(value, wanted)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: {name} fits no {wanted}: {error}", hint=_HINT) from error
    raise UserError(f"{where}: {name} holds {_kind(found)}, expected numbers for {wanted}", hint=_HINT)


def _kind(found: npt.NDArray[Any]) -> str:
    """What a JSON value holds, as people say it."""
    kinds = {"i": "whole numbers", "u": "whole numbers", "f": "fractions", "b": "true and false", "U": "text"}
    return kinds.get(found.dtype.kind, "other values") if found.size else "nothing"
