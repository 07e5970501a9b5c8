"""Runs what a Markdown file says, so that it stays true.

The words behind ``` decide what a fenced block is:

- ``bash`` is run, each block in a shell of its own that stops at the first command that fails; ``bash exit=1`` must end
  with that exit code; ``bash norun`` is left alone.
- ``text`` right behind a ``bash`` block that ran is what it printed. Other numbers and other blanks will do, and three
  dots stand for anything.
- ``files`` lists what there is afterwards that was not there before, one glob pattern a line.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIME_LIMIT_S = 300
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}

_FENCED = re.compile(r"^```(\w.*)\n((?:.*\n)*?)```$", re.MULTILINE)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
_BLANK = re.compile(r"[\s─]+")


class UntrueError(Exception):
    """A file says what is not so."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        where: file and line, for messages.
        language: ``bash``, ``text``, ``files`` or another.
        options: what stands behind the language.
        text: its lines.
    """

    where: str
    language: str
    options: tuple[str, ...]
    text: str

    @property
    def runs(self) -> bool:
        return self.language == "bash" and "norun" not in self.options

    @property
    def exit_code(self) -> int:
        codes = [option.removeprefix("exit=") for option in self.options if option.startswith("exit=")]
        return int(codes[0]) if codes else 0


def read_blocks(path: Path) -> list[Block]:
    """The fenced blocks of ``path`` that name a language."""
    content, blocks = path.read_text(encoding="utf-8"), []
    for match in _FENCED.finditer(content):
        language, *options = match[1].split()
        line = content.count("\n", 0, match.start()) + 1
        blocks.append(Block(f"{path}:{line}", language, tuple(options), match[2]))
    return blocks


def run_markdown(path: Path, directory: Path, commands: Path | None = None) -> None:
    """Do in ``directory`` what ``path`` says.

    Args:
        path: the file.
        directory: where its commands run.
        commands: a folder of commands that are meant before those that are installed.

    Raises:
        UntrueError: no block is to be run, or one ended otherwise, printed something else or left other files.
    """
    blocks, before, printed = read_blocks(path), _files(directory), None
    if not any(block.runs for block in blocks):
        raise UntrueError(f"{path} has no bash block that is to be run")
    for block in blocks:
        if block.language == "text" and printed is not None and not is_abridged(block.text, printed):
            raise UntrueError(f"{block.where} is not what was printed:\n{printed}")
        printed = _run(block, directory, commands) if block.runs else None
        if block.language == "files":
            _check_files(block, directory, _files(directory) - before)


def is_abridged(text: str, printed: str) -> bool:
    """Whether ``text`` is ``printed`` but for numbers, blanks and what ``...`` stands for.

    >>> is_abridged("keeps 4 of 8 experts", "keeps 3 of 12   experts")
    True
    >>> is_abridged("a ... d", "a b c d"), is_abridged("a d", "a b c d")
    (True, False)
    """
    expected, found = (_BLANK.sub(" ", _NUMBER.sub("#", words)).strip() for words in (text, printed))
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, found, re.DOTALL) is not None


def _run(block: Block, directory: Path, commands: Path | None) -> str:
    """What the block printed, errors too."""
    folders = (commands, Path(sys.executable).parent, os.environ.get("PATH", ""))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=directory,
        env={**os.environ, **ENVIRONMENT, "PATH": os.pathsep.join(str(folder) for folder in folders if folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if done.returncode != block.exit_code:
        raise UntrueError(f"{block.where} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def _files(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir()}


def _check_files(block: Block, directory: Path, left: set[Path]) -> None:
    """Exactly the files that ``block`` declares are ``left``."""
    declared: dict[str, Sequence[Path]] = {
        pattern: list(directory.glob(pattern)) for pattern in block.text.splitlines()
    }
    missing = [pattern for pattern, paths in declared.items() if not paths]
    surplus = left - {path for paths in declared.values() for path in paths}
    if missing:
        raise UntrueError(f"{block.where} declares what is not there: {missing}")
    if surplus:
        raise UntrueError(f"{block.where} leaves out {sorted(str(path.relative_to(directory)) for path in surplus)}")
