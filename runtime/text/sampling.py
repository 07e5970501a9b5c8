"""How the next token is chosen, and when to stop: as generation_config.json says, and whoever asks."""

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError
from moe_spec.record import Record, T, parse_object
from runtime.parity import softmax

Tokens = npt.NDArray[np.int64]

FILE_NAME = "generation_config.json"

LOGGER = logging.getLogger("moe_edge.text")

_OF_DRAWS = {"epsilon_cutoff": 0, "eta_cutoff": 0, "min_p": 0, "typical_p": 1}
_OF_ANY = {
    "min_length": 0, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_beams": 1, "repetition_penalty": 1
}  # fmt: skip
"""What generation_config.json may say of choosing tokens that is not done here, with the values that ask for nothing:
of drawn ones, and of any."""
_AGAIN = "export the model again"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Attributes:
        max_new_tokens: at most so many tokens follow a prompt.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: so many of the likeliest tokens are drawn from; 0 for all.
        top_p: only the likeliest of these that together have this probability are.
        seed: of the draws.
        stop: ids after which nothing follows.
        stop_strings: texts at which an answer ends; `writing` looks for them, tokens alone do not show them.
            Special tokens are no text: their ids go into ``stop``.
        padding: id that fills up prompts, and answers that have ended.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Collection[int] = ()
    stop_strings: Collection[str] = ()
    padding: int = 0

    def __post_init__(self) -> None:
        for name, allowed, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("temperature", self.temperature > 0 or self.top_k == 0, "more than 0 where top_k is given"),
            ("temperature", self.temperature > 0 or self.top_p == 1, "more than 0 where top_p is given"),
            ("seed", self.seed >= 0, "0 or more"),
            ("stop_strings", all(isinstance(text, str) and text for text in self.stop_strings), "texts, none empty"),
        ):
            if not allowed:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}", hint=f"give another {name}")

    @classmethod
    def of(cls, directory: Path, **given: Any) -> "Sampling":
        """What generation_config.json in ``directory`` says, but for what is ``given`` and not None.

        What it says of choosing tokens that is not done here is warned of.

        Raises:
            UserError: the file is broken, or a value is out of range.
        """
        path = directory / FILE_NAME
        config = Record(parse_object(path, path.read_bytes(), _AGAIN) if path.is_file() else {}, str(path), _AGAIN)
        said = _said(config)
        asked = {name: value for name, value in given.items() if value is not None}
        if {**said, **asked}.get("temperature") == 0:  # nothing is drawn, so what to draw from says nothing
            said = {name: value for name, value in said.items() if name not in ("top_k", "top_p")}
        sampling = cls(**{**said, **asked})
        without_effect = _OF_ANY | (_OF_DRAWS if sampling.temperature else {})
        ignored = sorted(
            name
            for name, value in without_effect.items()
            if config.take(name, float, default=None) not in (None, value)
        )
        if ignored:
            LOGGER.warning("%s asks for %s, which is not done here", path, ", ".join(ignored))
        return sampling


def _said(config: Record) -> dict[str, Any]:
    """What of `Sampling` generation_config.json says."""
    stop = _listed(config, "eos_token_id", int)
    said: dict[str, Any] = {
        "max_new_tokens": config.take("max_new_tokens", int, default=None),
        "stop": stop,
        "stop_strings": _listed(config, "stop_strings", str),
        "padding": config.take("pad_token_id", int, default=None),
    }
    if said["padding"] is None and stop:
        said["padding"] = stop[0]
    if config.take("do_sample", bool, default=None):
        temperature = config.take("temperature", float, default=None)
        said |= {
            "temperature": 1.0 if temperature is None else temperature,
            "top_k": config.take("top_k", int, default=None),
            "top_p": config.take("top_p", float, default=None),
        }
    return {name: value for name, value in said.items() if value is not None}


def _listed(config: Record, key: str, kind: type[T]) -> tuple[T, ...]:
    """What stands at ``key``: a list, one value, or nothing."""
    value = config.take(key, object, default=None)
    if value is None:
        return ()
    return config.items(key, kind) if isinstance(value, list) else (config.take(key, kind),)


def choose(logits_BV: npt.NDArray[np.float64], sampling: Sampling, random: np.random.Generator) -> Tokens:
    """A token (B,) for each row: the likeliest, or one drawn from the nucleus (https://arxiv.org/abs/1904.09751)."""
    if sampling.temperature == 0:
        likeliest_B: Tokens = logits_BV.argmax(axis=1)
        return likeliest_B
    order_BK = np.argsort(-logits_BV, axis=1, kind="stable")[:, : sampling.top_k or None]
    chances_BK = softmax(np.take_along_axis(logits_BV, order_BK, axis=1) / sampling.temperature)
    before_BK = np.cumsum(chances_BK, axis=1) - chances_BK
    sums_BK = np.cumsum(np.where(before_BK < sampling.top_p, chances_BK, 0), axis=1)
    place_B = (sums_BK > random.random((len(sums_BK), 1)) * sums_BK[:, -1:]).argmax(axis=1)
    drawn_B: Tokens = np.take_along_axis(order_BK, place_B[:, None], axis=1)[:, 0]
    return drawn_B
