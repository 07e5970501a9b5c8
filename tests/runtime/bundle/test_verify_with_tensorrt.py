"""verify.py of a bundle on TensorRT, over a stand-in for the library and the GPU."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_spec.dataset import Dataset
from moe_spec.errors import UserError
from moe_spec.manifest import Manifest
from runtime.bundle.bundle import bundle
from runtime.profiles import parse_profiles
from runtime.targets import find_target
from tests.runtime import tiny
from tests.runtime.bundle.on_device import Context, program, verify_with_tensorrt, write_engine

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


def built(bundled, directory, profiles=None, **graphs):
    """A copy of a bundle with its engine; with ``observed`` or another ``engine`` than its own from those graphs."""
    mine = Path(shutil.copytree(bundled, directory / "bundle"))
    profiles = Manifest.load(mine).details["profiles"] if profiles is None else profiles
    for name, graph in {"engine": mine / "model" / "model.onnx", **graphs}.items():
        write_engine(mine / "out" / f"{name}.plan", graph, profiles)
    return mine


def said(capsys):
    """What verify.py printed, without the times."""
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("tensorrt ")]


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


# --- what routers do -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("right") / "model")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Its second router chooses other experts."""
    return tiny.write(tmp_path_factory.mktemp("wrong") / "model", tiny.Tiny(rolled=1))


@pytest.fixture(scope="module")
def bundled(right, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundled") / "bundle"
    bundle(right, ORIN, out, DATA)
    return out


def test_two_engines_are_judged_one_by_its_routers(bundled, right, tmp_path, monkeypatch, capsys):
    mine = built(bundled, tmp_path, observed=right / "observed.onnx")
    assert verify_with_tensorrt(mine, monkeypatch) == 0
    assert said(capsys) == [
        "layer blocks.0.moe: 0 of 30 tokens select other experts",
        "layer blocks.1.moe: 0 of 30 tokens select other experts",
        "output logits: differs by 0.0e+00 of its range on 6 examples",
        "output logits of out/observed.plan: differs by 0.0e+00 of its range on 6 examples",
        "PASS",
    ]
    report = json.loads((mine / "out" / "report.json").read_text())
    assert report["observed"]["engine_sha256"] != report["engine_sha256"]
    assert [layer["tokens"] for layer in report["layers"]] == [30, 30]


def test_a_fault_of_either_engine_is_told(bundled, right, wrong, tmp_path, monkeypatch, capsys):
    mine = built(bundled, tmp_path / "observed", observed=wrong / "observed.onnx")
    assert verify_with_tensorrt(mine, monkeypatch) == 3
    (fault, *_, verdict) = [line for line in said(capsys) if not line.startswith(("layer", "output"))]
    clear = r"out/observed.plan: layer blocks.1.moe: \d+ tokens select other experts although the choice was clear"
    assert re.fullmatch(clear, fault)
    assert verdict == "FAIL"
    mine = built(bundled, tmp_path / "engine", observed=right / "observed.onnx", engine=wrong / "model.onnx")
    assert verify_with_tensorrt(mine, monkeypatch) == 3
    assert re.fullmatch(r"output logits: differs by .* of its range, allowed 1.0e-05", said(capsys)[-2])


def test_without_the_engine_that_shows_routers_it_says_what_it_does_not_know(bundled, tmp_path, monkeypatch, capsys):
    assert verify_with_tensorrt(built(bundled, tmp_path), monkeypatch) == 0
    assert said(capsys) == [
        "what routers do is not shown: an example that differs is excused where a choice was a near tie",
        "out/observed.plan shows it, which ./build.sh and python3 build.py make",
        "output logits: differs by 0.0e+00 of its range on 6 examples",
        "PASS",
    ]


def test_an_engine_that_flips_at_a_near_tie_is_excused_and_no_other(tmp_path, monkeypatch, capsys):
    """Experts 0 and 1 score almost the same; the engine's first router has them in the other order."""
    twins = tiny.write(tmp_path / "twins", tiny.Tiny(twins=True))
    singles = Dataset({"x": tiny.examples(12, sequence=1)}, None, "")
    bundle(twins, ORIN, tmp_path / "made", singles, batch_size=12, precision="float16")
    flipping = Path(shutil.copytree(twins, tmp_path / "flipping"))
    weights = bytearray((twins / "model.onnx.data").read_bytes())
    router = np.frombuffer(weights, np.float32, tiny.HIDDEN * tiny.EXPERTS).reshape(tiny.HIDDEN, tiny.EXPERTS)
    router[:, [0, 1]] = router[:, [1, 0]]
    (flipping / "model.onnx.data").write_bytes(weights)
    mine = built(tmp_path / "made", tmp_path / "mine", engine=flipping / "model.onnx")
    assert verify_with_tensorrt(mine, monkeypatch) == 0
    (output,) = json.loads((mine / "out" / "report.json").read_text())["outputs"]
    assert output["examples"] + output["excused"] == 12
    assert min(output["examples"], output["excused"]) > 0
    assert f" examples, {output['excused']} more are excused" in capsys.readouterr().out


def test_where_every_example_is_excused_nothing_was_compared(monkeypatch):
    output = program(monkeypatch)["Output"]("y", {"element": 1e-3})
    every, none = np.ones(2, bool), np.zeros(2, bool)
    output.add(np.ones((2, 3)), np.zeros((2, 3)), every, every)
    message = "output y: every example differs, and may have flipped, no element could be compared"
    assert output.reasons() == [message]
    output.add(np.ones((2, 3)), np.ones((2, 3)), every, every)
    assert (output.reasons(), output.report()["excused"]) == ([], 2)
    output.add(np.ones((2, 3)), np.zeros((2, 3)), every, none)
    assert output.reasons() == ["output y: differs by 1.0e+00 of its range, allowed 1.0e-03"]
