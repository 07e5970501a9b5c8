"""What goes into a model, and what is asked of it: checked before it runs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy.typing as npt

from moe_spec.dataset import MASK
from moe_spec.decoder import IDS, PAST, has_cache
from moe_spec.errors import UserError
from moe_spec.manifest import TensorSpec
from moe_spec.runner import Feeds


def check_feeds(inputs: Sequence[TensorSpec], feeds: Feeds, where: str) -> None:
    """Refuse feeds that the model does not take.

    Raises:
        UserError: names are missing or unknown, or an array has another dtype, rank or length than its input.
    """
    known = {spec.name: spec for spec in inputs}
    if feeds.keys() != known.keys():
        raise UserError(
            f"{where}: inputs are {', '.join(sorted(feeds)) or 'none'}, expected {', '.join(sorted(known))}",
            hint="name the arrays like the model's inputs",
        )
    lengths: dict[str, tuple[int, str]] = {}
    for name, spec in known.items():
        array = feeds[name]
        expected = f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"
        found = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
        if array.dtype.name != spec.dtype or not _fits(spec, array.shape):
            raise UserError(f"{where}: input {name} is {found}, expected {expected}", hint=_mend(spec, array))
        for dim, length in zip(spec.shape, array.shape, strict=True):
            if isinstance(dim, str) and lengths.setdefault(dim, (length, name))[0] != length:
                raise UserError(
                    f"{where}: axis {dim!r} is {lengths[dim][0]} in {lengths[dim][1]}, but {length} in {name}",
                    hint="give all inputs the same number of examples and the same lengths",
                )
    _check_mask(inputs, feeds, where)


def _check_mask(inputs: Sequence[TensorSpec], feeds: Feeds, where: str) -> None:
    """The mask of a decoder with a cache is for the tokens in the cache and the new ones."""
    if not has_cache(inputs) or not {MASK, IDS} <= feeds.keys():
        return
    batch, sequence = feeds[IDS].shape
    past = next(_past_lengths(inputs, feeds), 0)
    if feeds[MASK].shape != (batch, past + sequence):
        raise UserError(
            f"{where}: {MASK} is {list(feeds[MASK].shape)}, expected {[batch, past + sequence]}: {past} tokens are in "
            f"the cache, {sequence} are new",
            hint="give the mask of all tokens so far",
        )


def _past_lengths(inputs: Sequence[TensorSpec], feeds: Feeds) -> Iterator[int]:
    """Of the axes that count the tokens in a cache."""
    for spec in inputs:
        if spec.name.startswith(PAST):
            shape = zip(spec.shape[1:], feeds[spec.name].shape[1:], strict=True)
            yield from (length for dim, length in shape if isinstance(dim, str))


def select_outputs(outputs: Sequence[TensorSpec], wanted: Sequence[str] | None, where: str) -> list[str]:
    """The outputs asked for; all of them for None.

    Raises:
        UserError: the model has no such output.
    """
    known = [spec.name for spec in outputs]
    unknown = sorted(set(wanted or ()) - set(known))
    if unknown:
        raise UserError(
            f"{where} has no output {', '.join(unknown)}, its outputs are {', '.join(known)}",
            hint="ask for an output that the model has",
        )
    return known if wanted is None else list(wanted)


def _fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(spec.shape) and all(
        isinstance(dim, str) or dim == length for dim, length in zip(spec.shape, shape, strict=True)
    )


def _mend(spec: TensorSpec, array: npt.NDArray[Any]) -> str:
    if array.dtype.name != spec.dtype:
        return f"store it as {spec.dtype}: array.astype({spec.dtype!r})"
    return "check what the axes mean; examples are on axis 0"
