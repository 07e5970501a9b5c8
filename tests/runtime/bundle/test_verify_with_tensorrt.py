"""verify.py of a bundle on TensorRT, over a stand-in for the library and the GPU: what it asks of them, what it says."""

import json
import re
import shutil
from pathlib import Path

import pytest

from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.manifest import Manifest
from runtime.bundle.bundle import bundle
from runtime.profiles import parse_profiles
from runtime.targets import find_target
from tests.runtime import tiny
from tests.runtime.bundle.on_device import Context, verify_with_tensorrt, write_engine

ORIN = find_target("jetson-orin")
DATA = Dataset({"x": tiny.examples(6)}, None, "")
SMALL_AND_LARGE = parse_profiles(["x:1x1x8", "x:4x1x8"], ["x:1x5x8", "x:4x5x8"], ["x:3x5x8", "x:8x5x8"])
AGAIN = "hint: build it again from this bundle: ./build.sh or python3 build.py"


@pytest.fixture(scope="module")
def two_profiles(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    model = tiny.write(directory / "model")
    bundle(model, ORIN, directory / "bundle", DATA, batch_size=4, profiles=SMALL_AND_LARGE)
    return directory / "bundle"


def built(bundled, directory, profiles=None):
    """A copy of a bundle with its engine."""
    mine = Path(shutil.copytree(bundled, directory / "bundle"))
    profiles = Manifest.load(mine).details["profiles"] if profiles is None else profiles
    write_engine(mine / "out" / "engine.plan", mine / "model" / "model.onnx", profiles)
    return mine


def test_every_case_runs_in_a_profile_that_takes_it(two_profiles, tmp_path, monkeypatch):
    mine = built(two_profiles, tmp_path)
    assert [case["profile"] for case in Manifest.load(mine).details["golden"]] == [1, 0]
    assert verify_with_tensorrt(mine, monkeypatch) == 0
    assert Context.profiles_used[:2] == [1, 0]
    assert set(Context.profiles_used[2:]) == {1}  # the first case is timed


def test_shapes_that_the_engine_does_not_take_are_an_error(two_profiles, tmp_path, monkeypatch):
    small, large = Manifest.load(two_profiles).details["profiles"]
    for number, (profiles, message) in enumerate(
        [([small], "the engine has no profile 1"), ([large, small], "profile 1 of the engine takes no x of 4x5x8")]
    ):
        mine = built(two_profiles, tmp_path / str(number), profiles)
        with pytest.raises(UserError, match=f"^{re.escape(f'{message}{chr(10)}{AGAIN}')}$"):
            verify_with_tensorrt(mine, monkeypatch)
        assert not (mine / "out" / "report.json").exists()
