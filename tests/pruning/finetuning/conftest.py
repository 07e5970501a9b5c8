"""Training is quick here, but the Trainer collects garbage before each run, through all that torch ever imported."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def nothing_to_collect() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is there now is not looked at again
    yield
    gc.unfreeze()
