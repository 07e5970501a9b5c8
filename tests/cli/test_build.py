import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cli.build import _shown
from moe_spec.manifest import Manifest
from runtime.model_dir import model_bytes
from runtime.profiles import ShapeRange
from runtime.targets import TARGETS
from tests.cli.helpers import INTERRUPTIBLE, done, invoke, leftovers
from tests.runtime import tiny

KNOWN = ", ".join(sorted({name for target in TARGETS for name in (target.name, *target.aliases)}))


without_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the build process in /proc")


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def test_an_engine_is_built_and_summed_up(model, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    engine = tmp_path / "engine"
    code, out, _ = invoke("build", model, "-o", engine, "--target", "sm89")
    activations = Manifest.load(engine).details["memory"]["activations"]
    assert (code, out) == (
        0,
        f"{engine}: rtx-ada, {model_bytes(engine):,} bytes and {activations:,} of activations, takes x 1x1x8 to "
        "64x128x8 (default; choose with --minShapes --optShapes --maxShapes)\n",
    )


def test_shapes_are_given_as_to_trtexec(model, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    shapes = ("--minShapes=x:1x1x8", "--optShapes=x:2x5x8", "--maxShapes=x:4x5x8")
    code, out, _ = invoke("build", model, "-o", tmp_path / "engine", "--target", "sm86", *shapes, "--json")
    manifest = json.loads(out)
    assert code == 0
    assert manifest["details"]["profiles"][0]["x"] == {"min": [1, 1, 8], "opt": [2, 5, 8], "max": [4, 5, 8]}
    assert manifest == json.loads(json.dumps(Manifest.load(tmp_path / "engine").to_json()))


def test_the_caches_of_all_layers_are_shown_as_one():
    ids, cache = ShapeRange((1, 1), (1, 8), (8, 512)), ShapeRange((1, 3, 0, 64), (1, 3, 8, 64), (8, 3, 512, 64))
    profile = {f"past_key_values.{layer}.{kind}": cache for layer in range(30) for kind in ("key", "value")}
    assert _shown({"input_ids": ids} | profile) == ("input_ids 1x1 to 8x512, past_key_values.* 1x3x0x64 to 8x3x512x64")


def test_onnx_runtime_takes_any_shape(model, tmp_path):
    code, out, _ = invoke("build", model, "-o", tmp_path / "engine", "--target", "cpu")
    assert (code, out) == (0, f"{tmp_path}/engine: onnxruntime-cpu, {model_bytes(tmp_path / 'engine'):,} bytes\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--target", "rtx-adda"],
            f"error: unknown target 'rtx-adda'\nhint: did you mean 'rtx-ada'? known: {KNOWN}\n",
        ),
        (
            ["--target", "sm89", "--minShapes=x:1x1x8"],
            "error: --optShapes and --maxShapes missing: a profile needs all three options, or --optShapes alone\n"
            "hint: give --minShapes, --optShapes and --maxShapes, each with every dynamic input\n",
        ),
        (
            ["--target", "sm89", "--optShapes=y:1"],
            "error: the profile names y, but the model's inputs are x\n"
            "hint: name the model's inputs in --minShapes, --optShapes and --maxShapes\n",
        ),
    ],
)
def test_bad_options_end_with_exit_code_1_and_nothing_written(model, tmp_path, options, message):
    code, out, err = invoke("build", model, "-o", tmp_path / "engine", *options)
    assert (code, out) == (1, "")
    assert err.endswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_model_and_an_existing_output_are_errors(model, tmp_path):
    code, _, err = invoke("build", tmp_path / "no", "-o", tmp_path / "engine", "--target", "cpu")
    assert (code, err) == (
        1,
        f"error: {tmp_path}/no does not exist, expected an .onnx file or a model directory\nhint: check the path\n",
    )
    code, _, err = invoke("build", model, "-o", model, "--target", "cpu")
    assert (code, err) == (
        1,
        f"error: {model} already exists\nhint: give another -o, or remove it first: rm -r {model}\n",
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One that may be damaged, beside its model."""
    pytest.importorskip("tensorrt_rtx")
    root = tmp_path_factory.mktemp("engine")
    done("build", tiny.write(root / "model"), "-o", root / "engine", "--target", "sm89", "--optShapes=x:1x4x8")
    return root / "engine"


def cut(plan: bytes) -> bytes:
    return plan[:-1]


def flipped(plan: bytes) -> bytes:
    return plan[:-1] + bytes([plan[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flipped])
@pytest.mark.parametrize(
    ("verb", "options"), [("verify", ["--reference", "model"]), ("bench", []), ("run", ["--input", "data.npz"])]
)
def test_no_verb_opens_a_damaged_engine(engine, monkeypatch, verb, options, damage):
    monkeypatch.chdir(engine.parent)
    plan = engine / "model.engine"
    whole = plan.read_bytes()
    plan.write_bytes(damage(whole))
    np.savez("data.npz", x=tiny.examples(1))
    code, out, err = invoke(verb, "engine", *options)
    plan.write_bytes(whole)
    found = {
        cut: f"has {len(whole) - 1} bytes, manifest.json says {len(whole)}",
        flipped: "is not the file that manifest.json describes (sha256 differs)",
    }
    assert (code, out, err) == (
        1,
        "",
        f"error: engine/model.engine {found[damage]}\nhint: build it again: moe-edge build MODEL_DIRECTORY -o "
        "ENGINE_DIRECTORY --target rtx-ada --minShapes=x:1x4x8 --optShapes=x:1x4x8 --maxShapes=x:1x4x8\n",
    )


def started(model, engine):
    """A build that runs, and its worker, in the middle of its work."""
    pytest.importorskip("tensorrt_rtx")
    arguments = ["build", str(model), "-o", str(engine), "--target", "sm89"]
    code = INTERRUPTIBLE + f"from cli.main import main; main({arguments!r}, verbs=['build'])"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    return process, wait_for_worker(process.pid)


@without_proc
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_kill_end_the_build_process_too_and_leave_nothing(model, tmp_path, sent, code):
    process, worker = started(model, tmp_path / "engine")
    process.send_signal(sent)
    process.wait()
    assert process.returncode == code
    assert is_gone(worker)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@without_proc
def test_a_build_that_is_killed_takes_its_process_along_and_the_next_removes_what_it_left(model, tmp_path):
    process, worker = started(model, tmp_path / "engine")
    process.kill()
    process.wait()
    assert is_gone(worker)
    assert not any(engine.stat().st_size for engine in tmp_path.glob(".engine.*/model.engine"))  # it did not go on
    assert len(leftovers(tmp_path) - {"model"}) == 1
    done("build", model, "-o", tmp_path / "engine", "--target", "sm89")
    assert leftovers(tmp_path) == {"model", "engine"}


def is_gone(worker, seconds=60):
    """A process that was killed stays until its memory is given back and somebody has asked how it ended."""
    end = time.monotonic() + seconds
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return not Path(f"/proc/{worker}").exists()


def wait_for_worker(parent):
    while True:
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in (task / "children").read_text().split():
                if re.search(rb"runtime\.tensorrt\.worker", Path(f"/proc/{child}/cmdline").read_bytes()):
                    return int(child)
        time.sleep(0.01)
