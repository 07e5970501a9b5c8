"""How the tests run: what comes first, and what is imported where."""

import gc

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # what a busy machine makes slow is no failure
settings.load_profile("untimed")

gc.disable()  # while tests are collected: what they import stays

DOCUMENTS = ("test_docs.py", "test_readme.py", "test_samples.py")


def pytest_configure(config: pytest.Config) -> None:
    """Import torch where tests run, not where they are handed out: the workers would start only after that."""
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs documents comes first: each test takes long, and at the end one worker would wait for another's."""
    items.sort(key=lambda item: item.path.name not in DOCUMENTS)


def pytest_collection_finish() -> None:
    """Let garbage be looked for less often, and among new objects only: it was a fifteenth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()
