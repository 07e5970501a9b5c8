"""Inputs drawn at random, where there is no data."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.decoder import POSITIONS, axis_lengths, has_cache
from moe_spec.manifest import TensorSpec
from moe_spec.record import parse_object
from moe_spec.runner import Feeds

RANDOM_SHAPES = ((1, 1, 3), (2, 7, 0), (5, 4, 6))
"""Lengths of the leading and of the other dynamic axes, the first a single example of a single token; and how many
tokens are in the cache of a decoder that has one."""


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
        if is_floating(dtype):
            return random.standard_normal(shape).astype(dtype)
        if dtype.kind == "b" or "mask" in spec.name:
            return np.ones(shape, dtype)
        if "position" in spec.name:
            return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
        if "type" in spec.name:
            return np.zeros(shape, dtype)
        return random.integers(0, self.vocabulary, shape).astype(dtype)


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Also bfloat16 and its like, which numpy, told of them by ml_dtypes, takes for no numbers.

    >>> is_floating(np.dtype("float16")), is_floating(np.dtype("int64"))
    (True, False)
    """
    return "float" in dtype.name


def _vocabulary(config: Path) -> int:
    if not config.is_file():
        return 2
    values = parse_object(config, config.read_bytes(), "export the model again")
    text = values.get("text_config")
    sizes = (values.get("vocab_size"), text.get("vocab_size") if isinstance(text, dict) else None)
    return next((size for size in sizes if isinstance(size, int) and size > 0), 2)
