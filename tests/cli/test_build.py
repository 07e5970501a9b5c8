import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_spec.manifest import Manifest
from runtime.model_dir import model_bytes
from runtime.targets import TARGETS
from tests.cli.helpers import INTERRUPTIBLE, invoke
from tests.runtime import tiny

KNOWN = ", ".join(sorted({name for target in TARGETS for name in (target.name, *target.aliases)}))


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


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the build process in /proc")
def test_ctrl_c_ends_the_build_process_too_and_leaves_nothing(model, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    arguments = ["build", str(model), "-o", str(tmp_path / "engine"), "--target", "sm89"]
    code = INTERRUPTIBLE + f"from cli.main import main; main({arguments!r}, verbs=['build'])"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    worker = wait_for_worker(process.pid)
    os.kill(process.pid, signal.SIGINT)
    process.wait()
    assert process.returncode == 130
    assert is_gone(worker)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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
