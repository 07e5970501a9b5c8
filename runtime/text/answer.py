"""Text in, text out: a model's tokenizer around `runtime.text.generate`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.progress import Progress, counted, silent
from runtime.backends import open_session
from runtime.execution import BY_DEFAULT, Execution
from runtime.text.generate import generate
from runtime.text.sampling import Sampling, Tokens
from runtime.text.tokenizer import Tokenizer
from runtime.text.writing import Writing

OnText = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        prompt: what it was to go on from.
        text: what it wrote, without special tokens, up to the first stop string.
        tokens: the ids, those of the end among them.
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
    execution: Execution = BY_DEFAULT,
    on_text: OnText | None = None,
    on_progress: Progress = silent,
    **sampling: Any,
) -> list[Answer]:
    """Let a decoder go on from every prompt, all of them at once.

    Args:
        model: engine directory or model directory, with the tokenizer's files.
        prompts: where to go on from.
        chat: a prompt is what a user says to the model, by its chat template.
        threads: that one operator may use on a CPU; 0 for one a core.
        execution: how ONNX Runtime is to run it.
        on_text: told what the first answer goes on with, as soon as it is certain.
        on_progress: told of every token; all may end before the most that are allowed.
        sampling: what of `Sampling` is not to be as generation_config.json has it, by name.

    Raises:
        UserError: no decoder, no tokenizer or chat template, an empty prompt, or a value out of range.
        ModuleNotFoundError: the extra ``text`` is not installed.
    """
    directory = model if model.is_dir() else model.parent
    tokenizer, chosen = Tokenizer.load(directory), Sampling.of(directory, **sampling)
    ids = [tokenizer.encode_chat(prompt) if chat else tokenizer.encode(prompt) for prompt in prompts]
    writings = [Writing(tokenizer, chosen) for _ in prompts]

    def ends(tokens_B: Tokens) -> npt.NDArray[np.bool_]:
        return np.array([writing.add(token) for writing, token in zip(writings, tokens_B.tolist(), strict=True)])

    def tell(piece: str) -> None:
        if on_text is not None and piece:
            on_text(piece)

    with open_session(model, threads, execution) as session:
        for _ in counted(generate(session, ids, chosen, ends), "writing", chosen.max_new_tokens, on_progress):
            tell(writings[0].piece())
    tell(writings[0].piece(last=True))
    return [
        Answer(prompt, writing.text, tuple(writing.tokens), writing.ended)
        for prompt, writing in zip(prompts, writings, strict=True)
    ]
