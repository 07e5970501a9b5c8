"""One answer while it is written: its text so far, what of it is certain, and where a stop string ends it."""

import dataclasses
from collections.abc import Collection

from runtime.text.sampling import Sampling
from runtime.text.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"
"""What the first bytes of a longer character decode to."""


@dataclasses.dataclass
class Writing:
    """An answer that grows by a token at a time.

    Attributes:
        tokenizer: of the model.
        sampling: its ids and texts to stop at.
        tokens: the ids so far, those that made a stop string whole among them.
        ended: whether an id or a text to stop at came; nothing is added after it.
        given: how many characters `piece` has given.
    """

    tokenizer: Tokenizer
    sampling: Sampling
    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False
    given: int = 0

    def add(self, token: int) -> bool:
        """Take the next token, unless the answer has ended; say whether it has now."""
        if not self.ended:
            self.tokens.append(token)
            self.ended = token in self.sampling.stop or self._stopped()
        return self.ended

    @property
    def text(self) -> str:
        """What was written, without special tokens, up to the first stop string."""
        return before_stop(self.tokenizer.decode(self.tokens), self.sampling.stop_strings)

    def piece(self, *, last: bool = False) -> str:
        """What is certain of the text and was not given yet; all that is left where it is the ``last``.

        A character of several tokens comes with the last of them. What may begin a stop string waits until it is none.
        """
        text = self.text  # all of it: a piece depends on what stands before it
        if not (last or self.ended):
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - begun(text, self.sampling.stop_strings)]
        piece = text[self.given :]
        self.given += len(piece)
        return piece

    def _stopped(self) -> bool:
        stops = self.sampling.stop_strings
        return bool(stops) and any(stop in self.tokenizer.decode(self.tokens) for stop in stops)


def before_stop(text: str, stops: Collection[str]) -> str:
    """``text`` up to, not with, the first of ``stops`` in it.

    >>> before_stop("a dog, a cat.", [".", ", "])
    'a dog'
    """
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def begun(text: str, stops: Collection[str]) -> int:
    r"""How many characters at the end of ``text`` may be the beginning of one of ``stops``.

    >>> begun("so it ends\nUs", ["\nUser:", "s."])
    3
    """
    lengths = (length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length]))
    return max(lengths, default=0)
