"""Tiny decoders, one of each kind of cache."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel

from tests.families.configs import tiny
from tests.models_table import TINY, VOCABULARY, mixtral

WINDOW = 4


def windowed_mixtral() -> PreTrainedModel:
    """Every token sees itself and the three before it."""
    model = mixtral()
    model.config.sliding_window = WINDOW
    return model


DECODERS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "mixtral": windowed_mixtral,
    "qwen3_moe": TINY["qwen3_moe"],
    "gpt_oss": TINY["gpt_oss"],  # one layer with a window, one without, sinks in both
    "deepseek_v3": TINY["deepseek_v3"],  # keys and values of different widths
    "lfm2_moe": partial(tiny, "lfm2_moe"),  # a convolution's state, which does not grow
}


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of the words w4 to w127, with a chat template, as transformers lays them down."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, VOCABULARY))]
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(
        "{{ bos_token }} {% for message in messages %}{{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
