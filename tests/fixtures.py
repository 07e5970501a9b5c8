"""Fixtures that many tests share: a plugin of pytest, see `conftest.py`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.installed import build_package
from tests.markdown import ENVIRONMENT
from tests.own_code import save_own
from tests.warm import warm_commands
from tests.zoo import Zoo

torch.set_num_threads(1)  # two workers on two cores; tiny models gain nothing from more
torch._dynamo.config.fake_tensor_cache_enabled = False  # in a trace of two layers it takes more time than it saves


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if base.name.startswith("popen-gw") else base) / "zoo"
    root.mkdir(parents=True, exist_ok=True)
    return Zoo(root)


@pytest.fixture(scope="session")
def package(zoo: Zoo) -> Path:
    """A folder with our packages, and with the wheel and the sdist of them in ``dist``."""
    return zoo.once("package", build_package)


@pytest.fixture(scope="session")
def own_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint with code of its own, which transformers runs from a copy: not in the user's cache, here."""
    root = tmp_path_factory.mktemp("own_code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "modules"))
        yield save_own(root / "own")


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    """A folder of commands that start at once."""
    with warm_commands(ENVIRONMENT) as folder:
        yield folder
