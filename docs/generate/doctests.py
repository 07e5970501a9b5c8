"""Doctests in docstrings as fenced blocks: for Markdown ``>>>`` would be quotations in quotations."""

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"(?:^>>>.*(?:\n(?!>>>).*\S.*|\n>>>.*)*)", re.MULTILINE)


class FencedDoctests(griffe.Extension):
    """For mkdocstrings' Python handler."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Mend the docstring of whatever was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    r"""``docstring`` with a fence around each doctest.

    >>> fenced("Adds.\n\n>>> 1 + 1\n2\n\nSo.")
    'Adds.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nSo.'
    """
    return _DOCTEST.sub(lambda doctest: f"```pycon\n{doctest[0]}\n```", docstring)
