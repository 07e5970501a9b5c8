"""What the documentation says is so: its commands run, its links lead somewhere, its site needs no network."""

import doctest
import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from docs.generate import repository
from docs.generate.hooks import GENERATED
from tests.markdown import read_blocks, run_markdown, unfounded

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FIRST = DOCS / "tutorial.md"
RUN = sorted(PAGES, key=lambda page: (page != FIRST, page.parent.name != "howto", page))
"""The tutorial, then how-tos, which take up what it made, then explanations, which take up what those made."""

FILES = [ROOT / "README.md", *PAGES, *(ROOT / path for paths in repository.pages().values() for path in paths)]
_LINK = re.compile(r"\]\(([^()\s#]+)(?:#[^()\s]*)?\)")
_PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)+/?)`")
_MAKE = re.compile(r"(make .*\n)+")
"""What CI runs, and this suite is a part of."""
_FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["'](?:https?:)?//[^"']*""")


def test_the_commands_of_the_pages_run_one_page_after_the_other(tmp_path, commands):
    pages = [page for page in RUN if any(block.runs for block in read_blocks(page))]
    assert pages[0] == FIRST
    for page in pages:
        run_markdown(page, tmp_path, commands)


def test_a_block_that_is_not_run_says_why():
    left_alone = [block for path in FILES for block in read_blocks(path) if "norun" in block.options]
    reasons = [block for block in left_alone if not _MAKE.fullmatch(block.text)]
    assert reasons
    assert [block.where for block in reasons if not block.text.startswith("# Not run ")] == []


def test_what_is_shown_was_printed_or_says_why_nobody_looked():
    measured = ROOT / "benchmarks"  # each document of it is what one command printed
    shown = [path for path in FILES if not path.is_relative_to(measured)]
    assert [where for path in shown for where in unfounded(path)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if ">>>" in page.read_text()], ids=lambda page: page.stem)
def test_worked_numbers_are_so(page):
    text = page.read_text(encoding="utf-8")
    examples = doctest.DocTestParser().get_doctest(text, {}, page.stem, str(page), 0)
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples).failed == 0
    assert len(examples.examples) > 5


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(ROOT).as_posix() for path in FILES])
def test_links_between_files_lead_to_files(path):
    made = {DOCS / name for name in GENERATED}
    targets = [path.parent / link[1] for link in _LINK.finditer(path.read_text("utf-8")) if ":" not in link[1]]
    missing = [target for target in targets if not target.exists() and target.resolve() not in made]
    assert missing == []


def test_files_that_are_named_are_there():
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    named = {(path, found[1]) for path in FILES for found in _PATH.finditer(path.read_text("utf-8"))}
    of_ours = [(path, name) for path, name in named if name.partition("/")[0] in tops]
    assert of_ours
    assert [(path, name) for path, name in of_ours if path.name != "CHANGELOG.md" and not (ROOT / name).exists()] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; what mkdocs --strict warns of is an error."""
    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out), strict=True))
    return out


def test_the_site_fetches_nothing(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    assert [fetched[0] for page in pages for fetched in _FETCHED.finditer(page.read_text("utf-8"))] == []


def test_the_site_has_every_page_and_nothing_of_its_making(site):
    pages = [page.relative_to(DOCS) for page in PAGES] + [Path(name) for name in GENERATED]
    assert [page for page in pages if not (site / page.with_suffix(".html")).is_file()] == []
    assert list(site.rglob("*.py")) == []


def test_words_that_are_for_tests_are_not_shown(site):
    shown = (site / "howto" / "jetson-bundle.html").read_text("utf-8")
    assert "norun" not in shown
    assert "Not run here: it takes a Jetson." in shown


def test_reference_pages_show_what_docstrings_say(site):
    shown = (site / "reference" / "python.html").read_text("utf-8")
    assert 'id="pruning.calibrate.calibrate"' in shown
    assert "&gt;&gt;&gt;" not in re.sub(r"<pre>.*?</pre>", "", shown, flags=re.DOTALL)  # doctests are blocks of code
