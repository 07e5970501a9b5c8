"""Text in, text out: a model's tokenizer around `runtime.generate`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from runtime.backends import open_session
from runtime.generate import Sampling, Tokens, generate
from runtime.tokenizer import Tokenizer

OnText = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        prompt: what it was to go on from.
        text: what it wrote, without special tokens.
        tokens: the ids, that of the end among them.
        ended: whether it came to an end, instead of to the most tokens that were allowed.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    ended: bool


def answer(
    model: Path,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    threads: int = 0,
    on_text: OnText | None = None,
    **sampling: Any,
) -> list[Answer]:
    """Let a decoder go on from every prompt, all of them at once.

    Args:
        model: engine directory or model directory, with the tokenizer's files.
        prompts: where to go on from.
        chat: a prompt is what a user says to the model, by its chat template.
        threads: that one operator may use on a CPU; 0 for one a core.
        on_text: told what the first answer goes on with, as soon as it is known.
        sampling: what of `Sampling` is not to be as generation_config.json has it, by name.

    Raises:
        UserError: no decoder, no tokenizer or chat template, an empty prompt, or a value out of range.
        ModuleNotFoundError: the extra ``text`` is not installed.
    """
    directory = model if model.is_dir() else model.parent
    tokenizer, chosen = Tokenizer.load(directory), Sampling.of(directory, **sampling)
    ids = [tokenizer.encode_chat(prompt) if chat else tokenizer.encode(prompt) for prompt in prompts]
    steps: list[Tokens] = []
    with open_session(model, threads) as session:

        def first_answer() -> Iterator[int]:
            ended = False
            for step in generate(session, ids, chosen):
                steps.append(step)
                if not ended:
                    yield int(step[0])
                ended = ended or int(step[0]) in chosen.stop

        for piece in tokenizer.stream(first_answer()):
            if on_text is not None:
                on_text(piece)
    columns = zip(*(step.tolist() for step in steps), strict=True)
    return [_answer(prompt, column, tokenizer, chosen) for prompt, column in zip(prompts, columns, strict=True)]


def _answer(prompt: str, tokens: Sequence[int], tokenizer: Tokenizer, sampling: Sampling) -> Answer:
    """``tokens`` up to the end, behind which there is padding only."""
    ends = [place for place, token in enumerate(tokens) if token in sampling.stop]
    mine = tuple(tokens[: ends[0] + 1] if ends else tokens)
    return Answer(prompt, tokenizer.decode(mine), mine, ended=bool(ends))
