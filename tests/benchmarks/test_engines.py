"""What is printed of engines; they are built in tests/test_engines.py."""

from pathlib import Path

from benchmarks.engines import MEGABYTE, Row, report
from tests.engines import CASES


def test_a_row_says_what_was_built():
    row = Row("pruned (01)", "fp8, rest fp16", ("8.9", "12.0"), MEGABYTE // 2, 4 * MEGABYTE, 1.26)
    assert report([row]).endswith("| pruned (01) | fp8, rest fp16 | 8.9, 12.0 | 0.50 | 4.00 | 1.3 |")


def test_the_document_has_every_case():
    lines = Path("benchmarks/engines.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(CASES) + 2
