"""How a decoder with a cache is called: the names of what it takes and gives, and what follows from ids and mask.

One graph serves prefill and decode. For B examples with S new tokens, and P in the cache (none at first), it takes
``input_ids`` and ``position_ids`` (B, S), ``attention_mask`` (B, P + S), 0 where a token is padding, and a
``past_key_values.N.KIND`` for each tensor that layer N keeps. It gives ``logits`` and as many ``present.N.KIND``: the
past of the next call. ONNX Runtime's and optimum's generation loops use the same names.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_spec.dataset import MASK
from moe_spec.manifest import TensorSpec
from moe_spec.runner import Arrays, Feeds, Kept

IDS, POSITIONS = "input_ids", "position_ids"
PAST, PRESENT = "past_key_values.", "present."

BATCH, SEQUENCE, PAST_LENGTH = "batch_size", "sequence_length", "past_sequence_length"
TOTAL_LENGTH = f"{PAST_LENGTH} + {SEQUENCE}"
"""Names of dynamic axes in what is exported here."""


def has_cache(inputs: Iterable[TensorSpec]) -> bool:
    """Whether a model with these inputs is a decoder with a cache."""
    return any(spec.name.startswith(PAST) for spec in inputs)


def axis_lengths(inputs: Sequence[TensorSpec], batch: int, sequence: int, past: int) -> dict[str, int]:
    """The length of every named axis: ``batch`` where it leads an input, ``sequence`` elsewhere.

    Of a decoder with a cache, ``past`` is what its cache holds, and the mask is for that and the sequence together.

    >>> ids, mask = TensorSpec("input_ids", "int64", ("b", "s")), TensorSpec("attention_mask", "int64", ("b", "t"))
    >>> key = TensorSpec("past_key_values.0.key", "float32", ("b", 2, "p", 8))
    >>> axis_lengths([ids, mask, key], batch=3, sequence=2, past=5)
    {'b': 3, 's': 2, 't': 7, 'p': 5}
    >>> axis_lengths([ids, TensorSpec("attention_mask", "int64", ("b", "s"))], batch=3, sequence=2, past=0)
    {'b': 3, 's': 2}
    """
    leading = {spec.shape[0] for spec in inputs if spec.shape}
    of_ids = {dim for spec in inputs if spec.name == IDS for dim in spec.shape}
    lengths: dict[str, int] = {}
    for spec in inputs:
        for dim in spec.shape:
            if not isinstance(dim, str):
                continue
            if dim in leading:
                length = batch
            elif spec.name.startswith(PAST):
                length = past
            else:
                length = past + sequence if spec.name == MASK and dim not in of_ids else sequence
            lengths.setdefault(dim, length)
    return lengths


def positions_of(mask_BT: npt.NDArray[Any], sequence: int) -> npt.NDArray[np.int64]:
    """(B, S): the position of each of the last ``sequence`` tokens, padding not counted, as transformers has it.

    >>> positions_of(np.array([[0, 0, 1, 1], [1, 1, 1, 1]]), 3)
    array([[0, 0, 1],
           [1, 2, 3]])
    """
    counted_BT = np.cumsum(mask_BT != 0, axis=1, dtype=np.int64) - 1
    return np.maximum(counted_BT, 0)[:, mask_BT.shape[1] - sequence :]


def complete(inputs: Sequence[TensorSpec], feeds: Feeds) -> Arrays:
    """``feeds`` and what a decoder with a cache takes beside ids: an empty cache, a mask of ones, positions.

    What is there stays as it is, and so do the feeds of any other model.

    >>> ids = TensorSpec("input_ids", "int64", ("b", "s"))
    >>> key = TensorSpec("past_key_values.0.key", "float32", ("b", 2, "p", 8))
    >>> {name: array.shape for name, array in complete([ids, key], {"input_ids": np.zeros((3, 4), np.int64)}).items()}
    {'input_ids': (3, 4), 'past_key_values.0.key': (3, 2, 0, 8)}
    """
    completed = dict(feeds)
    if not has_cache(inputs) or IDS not in feeds or feeds[IDS].ndim != 2:
        return completed
    batch, sequence = feeds[IDS].shape
    lengths = axis_lengths(inputs, batch, sequence, past=0)
    for spec in inputs:
        if spec.name.startswith(PAST) and spec.name not in feeds:
            shape = tuple(lengths[dim] if isinstance(dim, str) else dim for dim in spec.shape)
            completed[spec.name] = np.broadcast_to(np.zeros((), spec.dtype), shape)  # of no size, however many
    known = {spec.name: np.dtype(spec.dtype) for spec in inputs}
    if MASK in known and MASK not in feeds:
        completed[MASK] = np.ones((batch, sequence), known[MASK])
    if POSITIONS in known and POSITIONS not in feeds:
        mask_BT = completed.get(MASK, np.ones((batch, sequence), np.bool_))
        completed[POSITIONS] = positions_of(mask_BT, sequence).astype(known[POSITIONS])
    return completed


def as_past(outputs: Feeds) -> Arrays:
    """What a call leaves in the cache, as the next one takes it."""
    return {PAST + name.removeprefix(PRESENT): array for name, array in outputs.items() if name.startswith(PRESENT)}


def step_in_memory(
    run: Callable[[Feeds], Arrays], inputs: Sequence[TensorSpec], feeds: Feeds, kept: Kept | None
) -> tuple[Arrays, Kept]:
    """`runtime.backend.Session.step` where what ``run`` gives is in this process's memory anyway."""
    outputs = run(complete(inputs, {**feeds, **(kept or {})}))
    return {name: array for name, array in outputs.items() if not name.startswith(PRESENT)}, as_past(outputs)
