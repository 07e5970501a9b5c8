"""The files that go along with a model whatever is done to it: tokenizer, preprocessor, generation settings."""

import shutil
from pathlib import Path

COMPANIONS = (
    "LICENSE*",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab*",
)
"""Patterns in a transformers directory; config.json is not among them, because its counts change."""


def copy_companions(source: Path, target: Path) -> None:
    """Copy what is there of `COMPANIONS` from directory ``source`` into directory ``target``."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
