"""How the next token is chosen, and when to stop: as generation_config.json says, and whoever asks."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.errors import UserError
from moe_spec.record import parse_object
from runtime.parity import softmax

Tokens = npt.NDArray[np.int64]

FILE_NAME = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Attributes:
        max_new_tokens: at most so many tokens follow a prompt.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        seed: of the draws.
        stop: ids after which nothing follows.
        stop_strings: texts at which an answer ends; `writing` looks for them, tokens alone do not show them.
            Special tokens are no text: their ids go into ``stop``.
        padding: id that fills up prompts, and answers that have ended.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Collection[int] = ()
    stop_strings: Collection[str] = ()
    padding: int = 0

    def __post_init__(self) -> None:
        for name, allowed, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("temperature", self.temperature > 0 or self.top_p == 1, "more than 0 where top_p is given"),
            ("stop_strings", all(isinstance(text, str) and text for text in self.stop_strings), "texts, none empty"),
        ):
            if not allowed:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}", hint=f"give another {name}")

    @classmethod
    def of(cls, directory: Path, **given: Any) -> "Sampling":
        """What generation_config.json in ``directory`` says, but for what is ``given`` and not None.

        Raises:
            UserError: the file is broken, or a value is out of range.
        """
        path = directory / FILE_NAME
        config = parse_object(path, path.read_bytes(), "export the model again") if path.is_file() else {}
        stop = config.get("eos_token_id")
        stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
        padding = config.get("pad_token_id")
        said = {
            "max_new_tokens": config.get("max_new_tokens"),
            "temperature": config.get("temperature", 1.0) if config.get("do_sample") else None,
            "top_p": config.get("top_p") if config.get("do_sample") else None,
            "stop": tuple(stop),
            "stop_strings": config.get("stop_strings"),
            "padding": stop[0] if padding is None and stop else padding,
        }
        chosen = {**said, **{name: value for name, value in given.items() if value is not None}}
        texts = chosen["stop_strings"] or ()
        chosen["stop_strings"] = tuple(texts) if isinstance(texts, list | tuple) else (texts,)
        return cls(**{name: value for name, value in chosen.items() if value is not None})


def choose(logits_BV: npt.NDArray[np.float64], sampling: Sampling, random: np.random.Generator) -> Tokens:
    """A token (B,) for each row: the likeliest, or one drawn from the nucleus (https://arxiv.org/abs/1904.09751)."""
    if sampling.temperature == 0:
        likeliest_B: Tokens = logits_BV.argmax(axis=1)
        return likeliest_B
    order_BV = np.argsort(-logits_BV, axis=1, kind="stable")
    chances_BV = softmax(np.take_along_axis(logits_BV, order_BV, axis=1) / sampling.temperature)
    before_BV = np.cumsum(chances_BV, axis=1) - chances_BV
    sums_BV = np.cumsum(np.where(before_BV < sampling.top_p, chances_BV, 0), axis=1)
    place_B = (sums_BV > random.random((len(sums_BV), 1)) * sums_BV[:, -1:]).argmax(axis=1)
    drawn_B: Tokens = np.take_along_axis(order_BV, place_B[:, None], axis=1)[:, 0]
    return drawn_B
