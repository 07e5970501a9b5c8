"""What a foreign model takes: named inputs, their dynamic axes, and random examples of any size."""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

HIDDEN = 16
VOCABULARY = 64
UNTRACED = ((1, 1), (3, 7), (2, 31))
"""Batch and sequence: a single token, an odd count, more tokens than experts times K. Never what was traced."""

Example = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a model.

    Attributes:
        axes: dynamic axes of each input, by axis number.
        example: ``example(batch, sequence, generator)`` gives random inputs of those sizes.
        traced: batch and sequence of the example that exporters see.
    """

    axes: Mapping[str, Mapping[int, str]]
    example: Callable[[int, int, torch.Generator], Example]
    traced: tuple[int, int] = (2, 5)

    def random(self, size: tuple[int, int], seed: int = 0) -> Example:
        """Inputs for ``size``, a batch and a sequence; the same for the same seed."""
        return self.example(*size, torch.Generator().manual_seed(seed))

    def to_trace(self) -> Example:
        """The example that exporters see."""
        return self.random(self.traced)


def _tokens(batch: int, sequence: int, generator: torch.Generator) -> Example:
    return {"x": torch.randn(batch * sequence, HIDDEN, generator=generator)}


def _sequences(batch: int, sequence: int, generator: torch.Generator) -> Example:
    return {"x": torch.randn(batch, sequence, HIDDEN, generator=generator)}


def _images(batch: int, _: int, generator: torch.Generator) -> Example:
    return {"x": torch.randn(batch, HIDDEN, 6, 6, generator=generator)}


def _text(batch: int, sequence: int, generator: torch.Generator) -> Example:
    ids = torch.randint(0, VOCABULARY, (batch, sequence), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _renamed(name: str, dtype: torch.dtype) -> Callable[[int, int, torch.Generator], Example]:
    return lambda *size: {name: _sequences(*size)["x"].to(dtype)}


_SEQUENCE = {0: "batch", 1: "sequence"}

TOKENS = Inputs({"x": {0: "tokens"}}, _tokens)
HALF_TOKENS = Inputs(TOKENS.axes, lambda *size: {"x": _tokens(*size)["x"].half()})
TWO_TOKENS = Inputs(TOKENS.axes, _tokens, traced=(1, 2))
SEQUENCES = Inputs({"x": _SEQUENCE}, _sequences)
HIDDEN_STATES = Inputs({"hidden_states": _SEQUENCE}, _renamed("hidden_states", torch.float32))
HALF_STATES = Inputs(HIDDEN_STATES.axes, _renamed("hidden_states", torch.float16))
BFLOAT_STATES = Inputs(HIDDEN_STATES.axes, _renamed("hidden_states", torch.bfloat16))
LAYER_INPUT = Inputs({"layer_input": _SEQUENCE}, _renamed("layer_input", torch.float32))
IMAGES = Inputs({"x": {0: "batch"}}, _images)
TEXT = Inputs({"input_ids": _SEQUENCE, "attention_mask": _SEQUENCE}, _text)
