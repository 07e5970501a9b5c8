"""Text generation: prompts in, tokens out one step at a time, what was computed kept in the cache between the steps."""

import dataclasses
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.dataset import MASK
from moe_spec.decoder import IDS
from moe_spec.errors import UserError
from moe_spec.record import parse_object
from moe_spec.runner import LOGITS, Kept
from runtime.backend import Session
from runtime.parity import softmax

Tokens = npt.NDArray[np.int64]
Ends = Callable[[Tokens], npt.NDArray[np.bool_]]

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


def generate(
    session: Session, prompts: Sequence[Sequence[int]], sampling: Sampling, ends: Ends | None = None
) -> Generator[Tokens, None, None]:
    """The next token (B,) of every prompt, step by step, until all have ended; who has ended gets padding.

    Prompts of several lengths are padded on the left. A model without a cache reads everything again at every step.

    Args:
        session: of a model with `moe_spec.decoder`'s inputs.
        prompts: token ids, at least one each.
        sampling: how tokens are chosen.
        ends: told the tokens (B,) of a step, says of which prompts (B,) these are the last, besides `Sampling.stop`.

    Raises:
        UserError: there is no prompt, one is empty, or the model is no decoder.
    """
    _check(session, prompts)
    random = np.random.default_rng(sampling.seed)
    ids_BS, mask_BT = pad_left(prompts, sampling.padding)
    ended_B = np.zeros(len(prompts), np.bool_)
    kept: Kept | None = None
    for _ in range(sampling.max_new_tokens):
        outputs, kept = session.step({IDS: ids_BS, MASK: mask_BT}, kept)
        drawn_B = choose(outputs[LOGITS][:, -1].astype(np.float64), sampling, random)
        next_B = np.where(ended_B, sampling.padding, drawn_B)
        ended_B |= np.isin(next_B, list(sampling.stop))
        if ends is not None:
            ended_B |= ends(next_B)
        yield next_B
        if ended_B.all():
            return
        ids_BS = next_B[:, None] if kept else np.concatenate((ids_BS, next_B[:, None]), axis=1)
        mask_BT = np.concatenate((mask_BT, np.ones_like(mask_BT[:, :1])), axis=1)


def pad_left(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tokens, Tokens]:
    """Ids and mask, both (B, S): the ends of all prompts are aligned.

    >>> pad_left([[7], [5, 6]], padding=0)
    (array([[0, 7],
           [5, 6]]), array([[0, 1],
           [1, 1]]))
    """
    longest = max(map(len, prompts))
    ids_BS = np.full((len(prompts), longest), padding, np.int64)
    mask_BS = np.zeros_like(ids_BS)
    for row, prompt in enumerate(prompts):
        ids_BS[row, longest - len(prompt) :] = prompt
        mask_BS[row, longest - len(prompt) :] = 1
    return ids_BS, mask_BS


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


def _check(session: Session, prompts: Sequence[Sequence[int]]) -> None:
    inputs, outputs = ({spec.name for spec in specs} for specs in (session.inputs, session.outputs))
    if IDS not in inputs or LOGITS not in outputs:
        raise UserError(
            f"the model takes {', '.join(sorted(inputs))} and gives {', '.join(sorted(outputs))}: it generates no text",
            hint=f"give a decoder, which takes {IDS} and gives {LOGITS}",
        )
    if not prompts or not all(prompts):
        raise UserError("a prompt has no token", hint="give every prompt at least one")
