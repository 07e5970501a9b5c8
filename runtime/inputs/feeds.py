"""What goes into a model: checked feeds, and random ones where there is no data."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.dataset import MASK
from moe_spec.decoder import IDS, PAST, POSITIONS, axis_lengths, has_cache
from moe_spec.errors import UserError
from moe_spec.manifest import TensorSpec
from moe_spec.runner import Feeds

RANDOM_SHAPES = ((1, 1, 3), (2, 7, 0), (5, 4, 6))
"""Lengths of the leading and of the other dynamic axes, the first a single example of a single token; and how many
tokens are in the cache of a decoder that has one."""


def check_feeds(inputs: Sequence[TensorSpec], feeds: Feeds, where: str) -> None:
    """Refuse feeds that the model does not take.

    Raises:
        UserError: names are missing or unknown, or an array has another dtype, rank or length than its input.
    """
    known = {spec.name: spec for spec in inputs}
    if feeds.keys() != known.keys():
        raise UserError(
            f"{where} takes {', '.join(sorted(known))}, but was given {', '.join(sorted(feeds)) or 'nothing'}",
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


@dataclasses.dataclass(frozen=True)
class RandomFeeds:
    """Inputs drawn at random.

    Floats are standard normal, flags True. Integers depend on the name: a mask is all ones, positions count up (from
    where the cache of a decoder ends), token types are 0, and other ids are uniform below ``vocabulary``.

    Attributes:
        inputs: of the model.
        vocabulary: ids are below it; ``vocab_size`` of config.json, or 2 where there is none.
        seed: of the generator.
    """

    inputs: tuple[TensorSpec, ...]
    vocabulary: int
    seed: int = 0

    @classmethod
    def of(cls, inputs: Sequence[TensorSpec], directory: Path) -> "RandomFeeds":
        """For a model in ``directory``, whose config.json may tell the size of the vocabulary."""
        return cls(tuple(inputs), _vocabulary(directory / "config.json"))

    def three_shapes(self) -> Iterator[Feeds]:
        """Feeds at each of ``RANDOM_SHAPES``."""
        for index, (leading, other, past) in enumerate(RANDOM_SHAPES):
            yield self.draw(leading, other, self.seed + index, past)

    def draw(self, leading: int, other: int, seed: int, past: int = 0) -> Feeds:
        """Feeds whose dynamic axes are ``leading`` long where they lead an input, and ``other`` elsewhere.

        The cache of a decoder that has one holds ``past`` tokens.
        """
        random = np.random.default_rng(seed)
        lengths = axis_lengths(self.inputs, leading, other, past)
        feeds = {}
        for spec in self.inputs:
            shape = tuple(dim if isinstance(dim, int) else lengths[dim] for dim in spec.shape)
            feeds[spec.name] = self._array(random, spec, shape)
        if has_cache(self.inputs) and POSITIONS in feeds:
            feeds[POSITIONS] += feeds[POSITIONS].dtype.type(past)
        return feeds

    def _array(self, random: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            return random.standard_normal(shape).astype(dtype)
        if dtype.kind == "b" or "mask" in spec.name:
            return np.ones(shape, dtype)
        if "position" in spec.name:
            return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
        if "type" in spec.name:
            return np.zeros(shape, dtype)
        return random.integers(0, self.vocabulary, shape).astype(dtype)


def _vocabulary(config: Path) -> int:
    if not config.is_file():
        return 2
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{config} is no complete JSON: {error}", hint="export the model again") from error
    size = values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")
    return size if isinstance(size, int) and size > 0 else 2
