"""Runs what a Markdown file says, so that it stays true.

The words behind ``` decide what a fenced block is:

- ``bash`` is run, each block in a shell of its own that stops at the first command that fails; ``bash exit=1`` must end
  with that exit code; ``bash norun`` is left alone.
- ``text`` right behind a ``bash`` block that ran is what it printed. Other blanks will do, and three dots stand for
  anything. Numbers that another processor gives too have to be the same, accuracies and flips have to be near, others,
  such as times, bytes and errors, may be any (`NEAR`). A ``text`` behind anything else is ``text unchecked: WHY``.
- ``files`` lists what there is afterwards that was not there before, one glob pattern a line.
"""

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TIME_LIMIT_S = 300
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}

_FENCED = re.compile(r"^```(\w.*)\n((?:.*\n)*?)```$", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?:e[+-]?\d+)?(?!\w)")  # the digits of a name are no number
_COUNT, _DECIMAL = r"\d+(?:,\d{3})*", r"\d+(?:\.\d+)?"
_BLANK = re.compile(r"[\s─]+")


@dataclasses.dataclass(frozen=True)
class Near:
    """How near a number has to come that stands between certain words.

    Attributes:
        before: a pattern that what is before it ends with.
        after: a pattern that what is behind it begins with.
        points: how far off it may be.
        share: how much farther, as a share of it.
        number: a pattern of what it looks like.
    """

    before: str
    after: str
    points: float = 0
    share: float = 0
    number: str = _COUNT

    def applies(self, text: str, found: re.Match[str]) -> bool:
        """Whether the number ``found`` in ``text`` is such a one."""
        before, after = text[: found.start()], text[found.end() :]
        fits = re.fullmatch(self.number, found[0]) and re.search(f"(?:{self.before})$", before)
        return bool(fits and re.match(self.after, after))

    def allows(self, said: str, found: str) -> bool:
        """Whether ``found`` is as near to what was ``said`` as it has to be."""
        expected, value = (float(number.replace(",", "")) for number in (said, found))
        return abs(value - expected) <= self.points + self.share * expected


NEAR = (
    Near("", r" flips| of [\d,]+ tokens (?:flip|select)", points=5, share=0.1),
    Near("tokens flip, |% (?:PASS|FAIL) ", "", points=5, share=0.1),  # without excuse; in the table of a demo
    Near("", r" ?%", points=1, number=_DECIMAL),
    Near("(?:keeps|merges|into|of|opset|expert) |K=", ""),
    Near(r"(?:\[|experts )(?:\d+,? )*(?:and )?", r",|\]|:| and | of "),  # ids
    Near("", r" (?:of \d|MoE|layers|experts|tokens|rows|steps|golden cases|examples(?! without)|\d\S*% )"),
)
"""Numbers that are compared: the first row that applies counts. Where none does, a number may be any."""


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

    @property
    def says_why(self) -> bool:
        """Whether it is ``unchecked: WHY``."""
        return self.options[:1] == ("unchecked:",) and len(self.options) > 1


def read_blocks(path: Path) -> list[Block]:
    """The fenced blocks of ``path`` that name a language."""
    content, blocks = path.read_text(encoding="utf-8"), []
    for match in _FENCED.finditer(content):
        language, *options = match[1].split()
        line = content.count("\n", 0, match.start()) + 1
        blocks.append(Block(f"{path}:{line}", language, tuple(options), match[2]))
    return blocks


def unfounded(path: Path) -> list[str]:
    """Where ``path`` shows what is compared with nothing, and does not say why."""
    blocks = read_blocks(path)
    run = [False, *(block.runs for block in blocks)]
    texts = [(block, behind_run) for block, behind_run in zip(blocks, run, strict=False) if block.language == "text"]
    return [block.where for block, behind_run in texts if not behind_run and not block.says_why]


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
    """Whether ``text`` is ``printed`` but for blanks, what ``...`` stands for, and numbers as far as `NEAR` lets them.

    >>> is_abridged("keeps 4 of 8 experts in 2.5 ms", "keeps 4 of 8   experts in 17 ms")
    True
    >>> is_abridged("keeps 4 of 8", "keeps 3 of 8"), is_abridged("K=2: [0, 3]", "K=2: [0, 4]")
    (False, False)
    >>> is_abridged("0 flips, accuracy 92.8%", "2 flips, accuracy 92.6%")
    True
    >>> is_abridged("0 flips", "900 flips"), is_abridged("accuracy 92.8%", "accuracy 10.0%")
    (False, False)
    >>> is_abridged("a ... d", "a b c d"), is_abridged("a d", "a b c d")
    (True, False)
    """
    expected, found = (_BLANK.sub(" ", words).strip() for words in (text, printed))
    parts: list[str] = []
    compared: list[tuple[Near, str]] = []
    for part in expected.split("..."):
        numbers = list(_NUMBER.finditer(part))
        rows = [next((row for row in NEAR if row.applies(part, number)), None) for number in numbers]
        compared += [(row, number[0]) for row, number in zip(rows, numbers, strict=True) if row is not None]
        words = map(re.escape, _NUMBER.split(part))
        kinds = (f"({row.number})" if row is not None else _NUMBER.pattern for row in rows)
        parts.append("".join(itertools.chain(*itertools.zip_longest(words, kinds, fillvalue=""))))
    match = re.fullmatch(".*".join(parts), found, re.DOTALL)
    return match is not None and all(
        row.allows(said, value) for (row, said), value in zip(compared, match.groups(), strict=True)
    )


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
