"""How long two decoders write the same text, each going on from what it wrote itself, always by the likeliest token."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_spec.dataset import MASK
from moe_spec.decoder import IDS
from moe_spec.progress import Progress, counted, silent
from moe_spec.runner import Feeds
from runtime.backend import Session
from runtime.text.generate import generate
from runtime.text.sampling import Sampling

PROMPTS = 4
"""So many are gone on from, at most."""


@dataclasses.dataclass(frozen=True)
class GreedyParity:
    """The common beginnings of what both write.

    Attributes:
        prompts: that both went on from.
        tokens: that each wrote.
        mean: mean number of tokens up to the first that differs.
        shortest: the smallest of these numbers.
    """

    prompts: int
    tokens: int
    mean: float
    shortest: int

    @property
    def says(self) -> str:
        """In words.

        >>> GreedyParity(prompts=1, tokens=16, mean=12.5, shortest=9).says
        '12.5 of 16 tokens are the same on average, at least 9, behind 1 prompt'
        """
        same = f"{self.mean:.1f} of {self.tokens} tokens are the same on average, at least {self.shortest}"
        return f"{same}, behind {self.prompts} prompt{'s' * (self.prompts != 1)}"


def compare_greedy(
    reference: Session,
    candidate: Session,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    on_progress: Progress = silent,
) -> GreedyParity:
    """Let both write ``tokens`` tokens; ``on_progress`` is told of each.

    Raises:
        UserError: a prompt has no token, or a model is no decoder.
    """
    sampling = Sampling(max_new_tokens=tokens)
    both = itertools.chain.from_iterable(generate(session, prompts, sampling) for session in (reference, candidate))
    written_NB = list(counted(both, "comparing texts", 2 * tokens, on_progress))
    mine_BN, theirs_BN = (np.stack(half, axis=1) for half in (written_NB[:tokens], written_NB[tokens:]))
    lengths_B = common_lengths(mine_BN, theirs_BN)
    return GreedyParity(len(prompts), tokens, float(lengths_B.mean()), int(lengths_B.min()))


def common_lengths(mine_BN: npt.NDArray[np.int64], theirs_BN: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many tokens (B,) both begin with.

    >>> common_lengths(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[1, 2, 3], [4, 0, 6]]))
    array([3, 1])
    """
    return np.asarray(np.cumprod(mine_BN == theirs_BN, axis=1).sum(axis=1))


def prompts_of(feeds: Feeds) -> list[list[int]]:
    """The tokens of the first `PROMPTS` examples, padding left out."""
    ids_BS = feeds[IDS][:PROMPTS]
    mask_BS = feeds.get(MASK, np.ones_like(feeds[IDS]))[:PROMPTS, -ids_BS.shape[1] :]
    found = [ids[mask != 0].tolist() for ids, mask in zip(ids_BS, mask_BS, strict=True)]
    return [prompt for prompt in found if prompt]
