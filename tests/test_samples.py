"""Every sample runs and prints and leaves what it says."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.tasks.corpus import DOMAINS
from benchmarks.tasks.sources import SMOLLM2, fetch
from moe_spec.errors import UserError
from tests.markdown import UntrueError, is_abridged, read_blocks, run_markdown, unfounded

FOLDER = Path(__file__).parents[1] / "samples"
SAMPLES = sorted(FOLDER.glob("*/README.md"))
FETCHED = {"07_branch_train_mix": (SMOLLM2, *DOMAINS.values())}
"""Packages that a sample takes weights and text out of."""

SECTIONS = ["Introduction", "Run it", "What you got"]

each_sample = pytest.mark.parametrize("readme", SAMPLES, ids=[path.parent.name for path in SAMPLES])


def test_there_are_samples_and_nothing_else_among_them():
    assert SAMPLES
    assert {path.parent for path in SAMPLES} == {path for path in FOLDER.iterdir() if path.is_dir()}


@each_sample
def test_a_sample_has_the_sections_of_a_sample_and_says_what_it_leaves(readme):
    assert re.findall(r"^## (.*)$", readme.read_text(encoding="utf-8"), re.MULTILINE) == SECTIONS
    assert [block.language for block in read_blocks(readme)].count("files") == 1


@pytest.fixture
def new_cache(tmp_path_factory, monkeypatch):
    """Nothing in it was made before; what was fetched is linked to it by ``fetched``."""
    directory = tmp_path_factory.mktemp("cache")

    def fetched(*packages):
        for package in packages:
            source = fetch(package)
            (directory / source.name).symlink_to(source)
        monkeypatch.setenv("MOE_EDGE_CACHE", str(directory))

    return fetched


@each_sample
def test_a_sample_runs_and_prints_and_leaves_what_it_says(readme, tmp_path, new_cache, commands):
    try:
        new_cache(*FETCHED.get(readme.parent.name, ()))
    except UserError as error:
        if "sha256" in error.what:
            raise
        pytest.skip(error.what)  # no package manager, or none that reaches an index
    shutil.copytree(readme.parent, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
    run_markdown(readme, tmp_path, commands)


# --- the runner itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markdown", "reason"),
    [
        ("```bash norun\nfalse\n```\n", "{path} has no bash block that is to be run"),
        ("```bash\nfalse\ntrue\n```\n", "{path}:1 ended with 1:\n"),
        ("```bash exit=1\ntrue\n```\n", "{path}:1 ended with 0:\n"),
        ("```bash\necho a 1\n```\n\n```text\na b\n```\n", "{path}:5 is not what was printed:\na 1\n"),
        ("```bash\necho K=3\n```\n```text\nK=4\n```\n", "{path}:4 is not what was printed:\nK=3\n"),
        ("```bash\ntouch a b\n```\n```files\nb\n```\n", "{path}:4 leaves out ['a']"),
        ("```bash\ntouch a\n```\n```files\n*\nb/*\n```\n", "{path}:4 declares what is not there: ['b/*']"),
    ],
)
def test_what_a_file_says_wrongly_is_named(markdown, reason, tmp_path):
    path, directory = tmp_path / "README.md", tmp_path / "empty"
    path.write_text(markdown)
    directory.mkdir()
    with pytest.raises(UntrueError, match=f"^{re.escape(reason.format(path=path))}$"):
        run_markdown(path, directory)


PRINTED = "PASS: 1000 examples of task data, float32, 0 flips, accuracy 92.8% (reference 92.8%)"


@pytest.mark.parametrize(
    ("said", "so"),
    [
        ("PASS: 1000 examples of task data, float32, 4 flips, accuracy 92.6% (reference 93.0%)", True),
        ("PASS: 1000 examples of task data, float32, 900 flips, accuracy 92.8% (reference 92.8%)", False),
        ("PASS: 1000 examples of task data, float32, 0 flips, accuracy 10.0% (reference 92.8%)", False),
        ("PASS: 1000 examples of task data, float32, 0 flips, accuracy 92.8% (reference 10.0%)", False),
        ("PASS: 1000 examples of task data, float16, 0 flips, accuracy 92.8% (reference 92.8%)", False),
        ("PASS: 500 examples of task data, float32, 0 flips, accuracy 92.8% (reference 92.8%)", False),
    ],
)
def test_numbers_have_to_be_as_near_as_their_words_say(said, so):
    assert is_abridged(said, PRINTED) == so


@pytest.mark.parametrize(
    ("markdown", "lines"),
    [
        ("```bash\necho\n```\n\n```text\na\n```\n", []),
        ("```bash norun\necho\n```\n\n```text\na\n```\n", [5]),
        ("```bash norun\necho\n```\n\n```text unchecked:\na\n```\n", [5]),
        ("```bash norun\necho\n```\n\n```text unchecked: it takes a GPU\na\n```\n", []),
        ("```text\na\n```\n```text\nb\n```\n", [1, 4]),
    ],
)
def test_what_nothing_printed_is_named(markdown, lines, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(markdown)
    assert unfounded(path) == [f"{path}:{line}" for line in lines]
