from pathlib import Path

import pytest

from report.report import report
from tests.report import runs


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with tiny models."""
    return runs.write_run(tmp_path_factory.mktemp("run") / "tiny-run")


@pytest.fixture(scope="session")
def page_file(run_directory: Path) -> Path:
    """Its report."""
    path = run_directory.with_suffix(".html")
    report(run_directory, path)
    return path


@pytest.fixture(scope="session")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on artifacts whose every name is markup."""
    directory = tmp_path_factory.mktemp("hostile")
    report(runs.write_hostile(directory / "run"), directory / "report.html")
    return directory / "report.html"
