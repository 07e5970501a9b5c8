"""Fixtures that many tests share."""

import pytest
import torch

from tests.zoo import Zoo

torch.set_num_threads(1)  # two workers on two cores; tiny models gain nothing from more


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if base.name.startswith("popen-gw") else base) / "zoo"
    root.mkdir(parents=True, exist_ok=True)
    return Zoo(root)
