"""What a user says, written down as a model's chat template has it: in jinja's sandbox, with what transformers adds."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_spec.errors import UserError


def render(template: str, messages: Sequence[Mapping[str, str]], special: Mapping[str, str], where: Path) -> str:
    """The text of ``messages`` that the model is to go on from.

    Args:
        template: in jinja; code of somebody else.
        messages: each with ``role`` and ``content``.
        special: special tokens by the names that templates have for them.
        where: the model's directory, for errors.

    Raises:
        UserError: the template is broken, or refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return environment.from_string(template).render(**{**special, **given})
    except Exception as error:  # whatever somebody else's code may raise
        raise UserError(
            f"the chat template of {where} fails: {error}",
            hint="leave out --chat and write the prompt as the model wants it, or mend the template",
        ) from error


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` around what a model said, for transformers' masks of a loss; here it is nothing."""

    tags = {"generation"}  # noqa: RUF012 - as jinja has it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """What stands inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    """The time here and now, as models are told it."""
    return datetime.datetime.now().astimezone().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own makes ``&`` and ``<`` fit for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
