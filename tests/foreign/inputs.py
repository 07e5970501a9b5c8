"""What a foreign model takes: named inputs, their dynamic axes, and random examples of any size."""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

HIDDEN = 16
VOCABULARY = 64
TRACED = (2, 5)
"""Batch and sequence of the example that is traced."""
UNTRACED = ((1, 1), (3, 7), (2, 31))
"""Batch and sequence of others: a single token, an odd count, more tokens than experts times K."""

Example = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a model.

    Attributes:
        axes: dynamic axes of each input, by axis number.
        example: ``example(batch, sequence, generator)`` gives random inputs of those sizes.
    """

    axes: Mapping[str, Mapping[int, str]]
    example: Callable[[int, int, torch.Generator], Example]

    def random(self, size: tuple[int, int] = TRACED, seed: int = 0) -> Example:
        """Inputs for ``size``, a batch and a sequence; the same for the same seed."""
        return self.example(*size, torch.Generator().manual_seed(seed))


def _tokens(batch: int, sequence: int, generator: torch.Generator) -> Example:
    return {"x": torch.randn(batch * sequence, HIDDEN, generator=generator)}


def _sequences(batch: int, sequence: int, generator: torch.Generator) -> Example:
    return {"x": torch.randn(batch, sequence, HIDDEN, generator=generator)}


def _hidden_states(batch: int, sequence: int, generator: torch.Generator) -> Example:
    return {"hidden_states": torch.randn(batch, sequence, HIDDEN, generator=generator)}


def _images(batch: int, _: int, generator: torch.Generator) -> Example:
    return {"x": torch.randn(batch, HIDDEN, 6, 6, generator=generator)}


def _text(batch: int, sequence: int, generator: torch.Generator) -> Example:
    ids = torch.randint(0, VOCABULARY, (batch, sequence), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


TOKENS = Inputs({"x": {0: "tokens"}}, _tokens)
SEQUENCES = Inputs({"x": {0: "batch", 1: "sequence"}}, _sequences)
HIDDEN_STATES = Inputs({"hidden_states": {0: "batch", 1: "sequence"}}, _hidden_states)
IMAGES = Inputs({"x": {0: "batch"}}, _images)
TEXT = Inputs({"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}, _text)
