"""What is printed of engines; they are built in tests/test_engines.py."""

from pathlib import Path

from benchmarks.command import Usage, python
from benchmarks.engines import MEGABYTE, Row, report
from tests.engines import CASES


def test_a_row_says_what_was_built():
    half = MEGABYTE // 2
    usage = Usage(3.0, 600 * MEGABYTE, 1.26)
    row = Row("top-1 (04)", "fp8, rest fp16", ("8.9", "12.0"), half, 8 * half, 3 * half, 5000 * half, usage)
    document = report([row], "python -m benchmarks.engines --quick")
    assert "`python -m benchmarks.engines --quick` printed this on " in document
    assert document.endswith("| top-1 (04) | fp8, rest fp16 | 8.9, 12.0 | 0.5 | 4.0 | 1.5 | 2,500.0 | 600 | 1.3 |")


def test_memory_is_that_of_the_command_and_of_what_it_starts():
    small, large = (
        python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'b\"x\" * {size}'])")
        for size in (0, 1 << 28)
    )
    assert small.peak_bytes + (1 << 27) < large.peak_bytes


def test_the_document_has_every_case():
    lines = Path("benchmarks/engines.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) >= len(CASES) + 2
