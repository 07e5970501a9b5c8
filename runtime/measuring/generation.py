"""What text generation asks of a decoder with a cache: to read a prompt, and then to write a token."""

from typing import Any

from moe_spec.decoder import PAST
from moe_spec.runner import Feeds, Kept
from runtime.measuring.memory import Timed


class Generation:
    """A prompt and one token behind it; the cache stays in between where the session left it.

    Each `write` follows a `read`, for a session may write over what earlier steps left.
    """

    def __init__(self, session: Timed, prompt: Feeds | None, token: Feeds) -> None:
        """Nothing is run yet.

        Args:
            session: of a decoder with a cache.
            prompt: None where the token is the first.
            token: ids, and mask and positions where the model takes them; a cache among them is not used.
        """
        self._session, self._prompt = session, prompt
        self._token: dict[str, Any] = {name: array for name, array in token.items() if not name.startswith(PAST)}
        self._kept: Kept | None = None

    def read(self) -> None:
        """The prompt, from an empty cache."""
        if self._prompt is not None:
            _, self._kept = self._session.step(self._prompt)

    def write(self) -> None:
        """The token, behind the prompt."""
        self._session.step(self._token, self._kept)
