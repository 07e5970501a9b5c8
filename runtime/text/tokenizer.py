"""Text to tokens and back, by the tokenizer's files beside a model; this file and `chat` need ``moe-edge[text]``."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_spec.errors import UserError
from moe_spec.record import parse_object

FILE_NAME = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

_AGAIN = "copy the tokenizer's files of the checkpoint beside the model again"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that was loaded.

    Attributes:
        library: the object of the library ``tokenizers``.
        template: how a chat is written down, in jinja; None where the model knows none.
        special: special tokens by the names that templates have for them.
        where: the directory, for errors.
    """

    library: Any
    template: str | None
    special: Mapping[str, str]
    where: Path

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """The tokenizer in ``directory``.

        Raises:
            UserError: there is none, or a file of it is broken.
            ModuleNotFoundError: ``tokenizers`` is not installed.
        """
        import tokenizers

        path = directory / FILE_NAME
        if not path.is_file():
            raise UserError(f"{directory} has no {FILE_NAME}, so no text can be read or written", hint=_AGAIN)
        try:
            library = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{path} is no tokenizer: {error}", hint=_AGAIN) from error
        library.no_padding()
        library.no_truncation()
        config = directory / CONFIG
        said = parse_object(config, config.read_bytes(), _AGAIN) if config.is_file() else {}
        tokens = {name: _content(value) for name, value in said.items() if name.endswith("_token")}
        special = {name: token for name, token in tokens.items() if token is not None}
        return cls(library, _template(directory, said), special, directory)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, with the special tokens that the model wants around it."""
        ids: list[int] = self.library.encode(text).ids
        return ids

    def encode_chat(self, message: str) -> list[int]:
        """Ids of a chat in which the user has said ``message``, and the model is to answer.

        Raises:
            UserError: the model has no chat template, or a broken one.
            ModuleNotFoundError: ``jinja2`` is not installed.
        """
        if self.template is None:
            raise UserError(f"{self.where} has no {TEMPLATE}, so the model knows no chat", hint="leave out --chat")
        from runtime.text.chat import render

        text = render(self.template, [{"role": "user", "content": message}], self.special, self.where)
        ids: list[int] = self.library.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, without special tokens."""
        text: str = self.library.decode(list(ids))
        return text


def _content(value: Any) -> str | None:
    """A token stands there as such, or in an object."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name; the others are for tools and documents
        named = [row for row in found if isinstance(row, dict) and row.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None
