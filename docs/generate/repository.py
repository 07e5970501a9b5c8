"""Which files of the repository are pages of the site too, and where a link between files leads there."""

import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = "docs"

SECTIONS = {
    "Samples": ("samples/README.md", "samples/*/README.md", "models/vmoe/fashion_mnist/README.md"),
    "Benchmarks": ("benchmarks/README.md", "benchmarks/*.md", "benchmarks/tasks/README.md"),
    "Project": ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md"),
}
"""Sections of the site made of files outside of ``docs``, by their patterns in the order of the site."""

_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^```(\w+)( .*)?$", re.MULTILINE)
_SHOWN_AS = {"files": "text", "bash": "bash"}


def pages() -> dict[str, list[str]]:
    """Paths of the files from the root, by section, none twice."""
    return {section: list(dict.fromkeys(_paths(patterns))) for section, patterns in SECTIONS.items()}


def uri(path: str) -> str | None:
    """Where the site has the file or folder ``path``; None where it has not.

    >>> uri("docs/index.md"), uri("benchmarks/faults.md"), uri("samples/01_prune_and_deploy_a_vmoe")
    ('index.md', 'repository/benchmarks/faults.md', 'repository/samples/01_prune_and_deploy_a_vmoe/README.md')
    >>> uri("Makefile")
    """
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    known = {known for paths in pages().values() for known in paths}
    found = next((name for name in (path, f"{path}/README.md") if name in known), None)
    return None if found is None else f"repository/{found}"


def with_links(markdown: str, page: str) -> str:
    """``markdown`` of the file ``page`` with links as the site needs them; what the site has not is its text alone.

    >>> with_links("see [faults](../benchmarks/faults.md#faults) and [make](../Makefile)", "docs/index.md")
    'see [faults](repository/benchmarks/faults.md#faults) and make'

    Args:
        markdown: of the file.
        page: its path from the root.
    """
    here = posixpath.dirname(uri(page) or page)

    def mended(link: re.Match[str]) -> str:
        target, _, part = link[3].partition("#")
        if not target or ":" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        there = uri(path)
        if there is None:  # a file that is not there at all stays a link, of which mkdocs --strict complains
            return link[2] if (ROOT / path).exists() else link[0]
        return f"{link[1]}[{link[2]}]({posixpath.relpath(there, here or '.')}{'#' * bool(part)}{part})"

    # an index of an index, as error messages have it, is no link
    return _outside_fences(markdown, lambda text: _LINK.sub(mended, text).replace("][", r"]\["))


def with_plain_fences(markdown: str) -> str:
    """Fenced blocks without the words that are for tests: ``bash norun`` is shown as ``bash``.

    >>> with_plain_fences("```bash norun")
    '```bash'
    """
    return _FENCE.sub(lambda fence: f"```{_SHOWN_AS.get(fence[1], fence[1])}", markdown)


def _paths(patterns: tuple[str, ...]) -> Iterator[str]:
    for pattern in patterns:
        yield from (os.fspath(path.relative_to(ROOT).as_posix()) for path in sorted(ROOT.glob(pattern)))


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else change(part) for part in parts)
