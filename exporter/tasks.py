"""What a model takes and gives, by task: example inputs to trace and to check with, and names of dynamic axes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig

from moe_spec.errors import UserError

Feeds = dict[str, npt.NDArray[Any]]

BATCH, SEQUENCE = "batch_size", "sequence_length"


@dataclasses.dataclass(frozen=True)
class Task:
    """How models of one kind are called.

    Attributes:
        axes: dynamic axes of each input, by axis number.
        outputs: names of the outputs that are exported.
        example: ``example(config, batch, sequence, rng)`` gives inputs of those sizes.
    """

    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    example: Callable[[PreTrainedConfig, int, int, np.random.Generator], Feeds]


def _text(config: PreTrainedConfig, batch: int, sequence: int, rng: np.random.Generator) -> Feeds:
    ids = rng.integers(0, config.get_text_config().vocab_size, (batch, sequence), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _image(config: PreTrainedConfig, batch: int, _: int, rng: np.random.Generator) -> Feeds:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch, config.num_channels, height, width)
    return {"pixel_values": rng.standard_normal(shape, dtype=np.float32)}


_TEXT_AXES = {"input_ids": {0: BATCH, 1: SEQUENCE}, "attention_mask": {0: BATCH, 1: SEQUENCE}}

TASKS: Mapping[str, Task] = {
    "ForCausalLM": Task(_TEXT_AXES, ("logits",), _text),
    "ForConditionalGeneration": Task(_TEXT_AXES, ("logits",), _text),
    "ForSequenceClassification": Task(_TEXT_AXES, ("logits",), _text),
    "ForTokenClassification": Task(_TEXT_AXES, ("logits",), _text),
    "ForImageClassification": Task({"pixel_values": {0: BATCH}}, ("logits",), _image),
    "TextModel": Task(_TEXT_AXES, ("last_hidden_state",), _text),
}
"""By the end of the architecture's name."""


def task_of(architecture: str) -> Task:
    """The task of a model class.

    >>> task_of("MixtralForCausalLM").outputs
    ('logits',)

    Raises:
        UserError: no task is known for it.
    """
    for suffix, task in TASKS.items():
        if architecture.endswith(suffix):
            return task
    raise UserError(
        f"{architecture} is none of the model kinds that are exported", hint=f"known: *{', *'.join(sorted(TASKS))}"
    )
