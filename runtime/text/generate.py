"""Text generation: prompts in, tokens out one step at a time, what was computed kept in the cache between the steps."""

from collections.abc import Callable, Generator, Sequence

import numpy as np
import numpy.typing as npt

from moe_spec.dataset import MASK
from moe_spec.decoder import IDS, POSITIONS, positions_of
from moe_spec.errors import UserError
from moe_spec.runner import LOGITS, Feeds, Kept
from runtime.backend import Session
from runtime.text.sampling import Sampling, Tokens, choose

Ends = Callable[[Tokens], npt.NDArray[np.bool_]]


def generate(
    session: Session, prompts: Sequence[Sequence[int]], sampling: Sampling, ends: Ends | None = None
) -> Generator[Tokens, None, None]:
    """The next token (B,) of every prompt, step by step, until all have ended; who has ended gets padding.

    Prompts of several lengths are padded on the left. A model without a cache reads everything again at every step.

    Args:
        session: of a model with `moe_spec.decoder`'s inputs, but for the mask and positions if it does without.
        prompts: token ids, at least one each.
        sampling: how tokens are chosen.
        ends: told the tokens (B,) of a step, says of which prompts (B,) these are the last, besides `Sampling.stop`.

    Raises:
        UserError: there is no prompt, one is empty, or they differ in length and the model has no mask to tell padding
            by; or the model is no decoder.
    """
    _check(session, prompts)
    random = np.random.default_rng(sampling.seed)
    ids_BS, mask_BT = pad_left(prompts, sampling.padding)
    ended_B = np.zeros(len(prompts), np.bool_)
    kept: Kept | None = None
    for _ in range(sampling.max_new_tokens):
        outputs, kept = session.step(_feeds(session, ids_BS, mask_BT), kept)
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


def _feeds(session: Session, ids_BS: Tokens, mask_BT: Tokens) -> Feeds:
    """What of ids, mask and positions the model takes, in its own formats."""
    known = {IDS: ids_BS, MASK: mask_BT, POSITIONS: positions_of(mask_BT, ids_BS.shape[1])}
    return {spec.name: known[spec.name].astype(spec.dtype) for spec in session.inputs if spec.name in known}


def _check(session: Session, prompts: Sequence[Sequence[int]]) -> None:
    inputs, outputs = ({spec.name: spec for spec in specs} for specs in (session.inputs, session.outputs))
    if IDS not in inputs or LOGITS not in outputs:
        raise UserError(
            f"the model takes {', '.join(sorted(inputs))} and gives {', '.join(sorted(outputs))}: it generates no text",
            hint=f"give a decoder, which takes {IDS} and gives {LOGITS}",
        )
    shape = outputs[LOGITS].shape
    if shape and len(shape) != 3:  # () where the file does not say
        raise UserError(
            f"{LOGITS} is [{', '.join(map(str, shape))}], expected three axes: the model generates no text",
            hint=f"give a decoder, whose {LOGITS} are of every token; of a classifier give the ids with --input",
        )
    if not prompts or not all(prompts):
        raise UserError("a prompt has no token", hint="give every prompt at least one")
    if MASK not in inputs and len({*map(len, prompts)}) > 1:
        raise UserError(
            f"the prompts have {' and '.join(map(str, sorted({*map(len, prompts)})))} tokens, and the model takes no "
            f"{MASK}, without which it cannot tell padding",
            hint="give it one prompt at a time",
        )
