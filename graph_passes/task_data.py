"""Whether task data fits a graph, checked before anything runs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.dataset import MASK, Dataset
from moe_spec.decoder import complete
from moe_spec.errors import UserError, did_you_mean
from moe_spec.manifest import TensorSpec
from moe_spec.runner import Feeds

_KINDS = {"f": "f", "i": "biu", "u": "biu", "b": "b"}
"""What an input of this kind is made from."""


def fit_data(data: Dataset, inputs: Sequence[TensorSpec], where: str) -> Dataset:
    """``data`` as a graph with ``inputs`` takes it: in its number formats, and all tokens valid where no mask is given.

    A decoder with a cache starts with an empty one.

    Raises:
        UserError: an array is missing, unknown, or of another kind or shape; ``where`` names their file.
    """
    known = [spec.name for spec in inputs]
    for name in data.feeds:
        if name not in known:
            raise UserError(
                f"{where} holds the array {name!r}, which the model does not take", hint=did_you_mean(name, known)
            )
    feeds = complete(inputs, data.feeds)
    for spec in inputs:
        if spec.name == MASK and MASK not in feeds:
            feeds[MASK] = _all_valid(spec, inputs, data.feeds)
    return dataclasses.replace(data, feeds={spec.name: _as_input(spec, feeds, where) for spec in inputs})


def _all_valid(mask: TensorSpec, inputs: Sequence[TensorSpec], feeds: Feeds) -> npt.NDArray[Any]:
    """Ones, as long as the input whose axes the mask has."""
    twins = [feeds[spec.name] for spec in inputs if spec.shape == mask.shape and spec.name in feeds]
    return np.ones(twins[0].shape if twins else (), np.int64)


def _as_input(spec: TensorSpec, feeds: Feeds, where: str) -> npt.NDArray[Any]:
    if spec.name not in feeds:
        raise UserError(f"{where} lacks the array {spec.name!r}", hint=f"store the model's input as {spec.name!r}")
    array, dtype = feeds[spec.name], np.dtype(spec.dtype)
    fits = array.ndim == len(spec.shape) and all(
        length == dim for length, dim in zip(array.shape[1:], spec.shape[1:], strict=True) if isinstance(dim, int)
    )
    if not fits or _kind(array.dtype) not in _KINDS.get(_kind(dtype), ""):
        raise UserError(
            f"{where}: {spec.name} are {array.dtype}{list(array.shape)}, expected {dtype}"
            f"[{', '.join(map(str, spec.shape))}]",
            hint="store them as the model takes them, or store uint8 `images`",
        )
    return array.astype(dtype, copy=False)


def _kind(dtype: np.dtype[Any]) -> str:
    """As numpy's, of bfloat16 too."""
    return "f" if "float" in dtype.name else dtype.kind


def fixed_batch(inputs: Sequence[TensorSpec]) -> int | None:
    """How many examples a graph takes at once, where it was exported for so many."""
    leading = (spec.shape[0] for spec in inputs if spec.shape)
    return next((dim for dim in leading if isinstance(dim, int)), None)


def check_batches(
    data: Dataset, inputs: Sequence[TensorSpec], batch_size: int, where: str, mend: str = "--batch-size {} --limit {}"
) -> None:
    """Refuse batches of another size than a graph takes; ``where`` names it.

    ``mend`` is the hint for who has other data: with the size of batches, and how many whole ones the data has.

    Raises:
        UserError: the graph was exported for a fixed number of examples, and a batch has more or fewer; or an input is
            no batch.
    """
    for spec in inputs:
        if not spec.shape:
            raise UserError(
                f"{where} takes the single number {spec.name!r}, and data has one for each example",
                hint="export the model with that number in it",
            )
        fixed = spec.shape[0]
        if isinstance(fixed, int) and (fixed != batch_size or len(data) % fixed):
            raise UserError(
                f"{where} takes exactly {fixed} examples at once, not {len(data)} in batches of {batch_size}",
                hint=f"{mend.format(fixed, len(data) - len(data) % fixed)}, or export it with a dynamic axis",
            )
