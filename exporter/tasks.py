"""What a model takes and gives, by task: example inputs to trace and to check with, and names of dynamic axes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from exporter.cache import State, find_states
from moe_spec.dataset import MASK
from moe_spec.decoder import BATCH, IDS, POSITIONS, SEQUENCE, TOTAL_LENGTH, positions_of
from moe_spec.errors import UserError, did_you_mean
from moe_spec.runner import LOGITS

Feeds = dict[str, npt.NDArray[Any]]

PADDED = 2
"""Tokens on the left of the first example that are padding, where a decoder with a cache gets several examples."""

TRACED_PAST = 3
"""Tokens in the cache of the example that is traced."""

DECODED = "decoder_sequence_length"
"""Tokens that the decoder of an encoder-decoder reads."""


@dataclasses.dataclass(frozen=True)
class Task:
    """How models of one kind are called.

    Attributes:
        axes: dynamic axes of each input, by axis number.
        outputs: names of the outputs that are exported, those of a cache not among them.
        example: ``example(config, batch, sequence, rng)`` gives inputs of those sizes.
        generates: whether models of this task are decoders, which may have a cache.
        headless: whether the model's head is left out.
        states: what the layers of a decoder with a cache keep; its ``example`` takes ``past=`` too.
    """

    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    example: Callable[..., Feeds]
    generates: bool = False
    headless: bool = False
    states: tuple[State, ...] = ()

    @property
    def all_outputs(self) -> tuple[str, ...]:
        """Those of a cache too."""
        return (*self.outputs, *(state.present for state in self.states))


def _text(config: PreTrainedConfig, batch: int, sequence: int, rng: np.random.Generator) -> Feeds:
    ids = rng.integers(0, config.get_text_config().vocab_size, (batch, sequence), dtype=np.int64)
    return {IDS: ids, MASK: np.ones_like(ids)}


def _text_pair(config: PreTrainedConfig, batch: int, sequence: int, rng: np.random.Generator) -> Feeds:
    decoded = _text(config, batch, sequence // 2 + 1, rng)[IDS]
    return {**_text(config, batch, sequence, rng), "decoder_input_ids": decoded}


def _image(config: PreTrainedConfig, batch: int, _: int, rng: np.random.Generator) -> Feeds:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch, config.num_channels, height, width)
    return {"pixel_values": rng.standard_normal(shape, dtype=np.float32)}


_TEXT_AXES = {IDS: {0: BATCH, 1: SEQUENCE}, MASK: {0: BATCH, 1: SEQUENCE}}
_PAIR_AXES = {**_TEXT_AXES, "decoder_input_ids": {0: BATCH, 1: DECODED}}
_FEATURES = "last_hidden_state"

FEATURE_EXTRACTION = "feature-extraction"

TASKS: Mapping[str, Task] = {
    FEATURE_EXTRACTION: Task(_TEXT_AXES, (_FEATURES,), _text, headless=True),
    "image-classification": Task({"pixel_values": {0: BATCH}}, (LOGITS,), _image),
    "text2text-generation": Task(_PAIR_AXES, (LOGITS,), _text_pair),
    "text-classification": Task(_TEXT_AXES, (LOGITS,), _text),
    "text-generation": Task(_TEXT_AXES, (LOGITS,), _text, generates=True),
    "token-classification": Task(_TEXT_AXES, (LOGITS,), _text),
}
"""By the name that `--task` takes, which is Hugging Face's."""

MADE_FOR: Mapping[str, str] = {
    "SwitchTransformersForConditionalGeneration": "text2text-generation",
    "ForCausalLM": "text-generation",
    "ForConditionalGeneration": "text-generation",
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "Model": FEATURE_EXTRACTION,
}
"""The task of an architecture, by the end of its name."""


def task_of(architecture: str, name: str | None = None) -> Task:
    """The task ``name`` of a model class, or the one that it is made for.

    >>> task_of("MixtralForCausalLM").outputs
    ('logits',)
    >>> task_of("MixtralForCausalLM", "feature-extraction").outputs
    ('last_hidden_state',)

    Raises:
        UserError: there is no such task, none is known for the class, or the class is made for another.
    """
    own = next((task for suffix, task in MADE_FOR.items() if architecture.endswith(suffix)), None)
    if own is None:
        raise UserError(
            f"{architecture} is none of the model kinds that are exported", hint=f"known: *{', *'.join(MADE_FOR)}"
        )
    if name is None or name == own:
        return TASKS[own]
    if name == FEATURE_EXTRACTION:
        return dataclasses.replace(TASKS[own], outputs=(_FEATURES,), generates=False, headless=True)
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}", hint=did_you_mean(name, TASKS))
    raise UserError(
        f"{architecture} is made for {own}, not for {name}",
        hint=f"--task {own}, or --task {FEATURE_EXTRACTION} for what is below its head",
    )


def part_of(model: PreTrainedModel, task: Task) -> nn.Module:
    """What of ``model`` is called: all of it, or what is below its head.

    Raises:
        UserError: it is nothing but a head.
    """
    if not task.headless:
        return model
    if model.base_model is model and not type(model).__name__.endswith("Model"):
        raise UserError(f"{type(model).__name__} has no part without its head", hint="export it without --task")
    below: nn.Module = model.base_model
    return below


def task_like(outputs: Iterable[str]) -> str | None:
    """The name of the task whose ``outputs`` these are, where it is not what the architecture is made for.

    >>> task_like(["last_hidden_state"]), task_like(["logits"])
    ('feature-extraction', None)
    """
    return FEATURE_EXTRACTION if _FEATURES in outputs else None


def with_cache(task: Task, model: PreTrainedModel) -> Task:
    """``task`` of the decoder ``model``, with a cache between calls (`moe_spec.decoder`); encoder-decoders have none.

    Raises:
        UserError: it has no cache that can be an input.
    """
    if not task.generates or model.config.is_encoder_decoder:
        return task
    states = find_states(model)
    past = {state.past: state.axes for state in states}
    axes = {**task.axes, MASK: {0: BATCH, 1: TOTAL_LENGTH}, POSITIONS: {0: BATCH, 1: SEQUENCE}, **past}

    def example(
        config: PreTrainedConfig, batch: int, sequence: int, rng: np.random.Generator, past: int = TRACED_PAST
    ) -> Feeds:
        feeds = task.example(config, batch, past + sequence, rng)
        feeds[IDS] = feeds[IDS][:, past:]
        if batch > 1:
            feeds[MASK][0, :PADDED] = 0
        feeds[POSITIONS] = positions_of(feeds[MASK], sequence)
        return {**feeds, **{state.past: _random(state, batch, past, rng) for state in states}}

    return dataclasses.replace(task, axes=axes, example=example, states=states)


def _random(state: State, batch: int, past: int, rng: np.random.Generator) -> npt.NDArray[Any]:
    shape = [dim if isinstance(dim, int) else batch if dim == BATCH else past for dim in state.shape]
    floating = state.dtype.is_floating_point  # halves are fed as float32, and cast where the graph wants them
    dtype = np.dtype(np.float32) if floating else torch.empty((), dtype=state.dtype).numpy().dtype
    return rng.standard_normal(shape).astype(dtype)
