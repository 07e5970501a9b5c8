import json
import subprocess
import sys

import numpy as np
import pytest

from tests.cli.helpers import done, invoke
from tests.runtime import tiny


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def test_a_bundle_of_task_data_says_how_to_check_it(model, tmp_path):
    np.savez(tmp_path / "data.npz", x=tiny.examples(6))
    out = tmp_path / "bundle"
    options = ("--target", "jetson-orin", "--data", tmp_path / "data.npz", "--optShapes=x:4x5x8", "--batch-size", 4)
    shown = done("bundle", model, *options, "-o", out)
    assert shown.startswith(f"{out}: for jetson-orin, ")
    assert shown.endswith(
        f" bytes, 1 golden case; check it: python3 {out}/verify.py --backend onnxruntime\n"
    )  # the last two examples do not fit shapes that are fixed
    subprocess.run([sys.executable, out / "verify.py", "--backend", "onnxruntime"], check=True, capture_output=True)
    assert "target: jetson-orin\n" in done("inspect", out)


def test_machines_get_the_manifest(model, tmp_path):
    manifest = json.loads(done("bundle", model, "--target", "rtx-ada", "-o", tmp_path / "bundle", "--json"))
    assert (manifest["kind"], manifest["details"]["package"]) == ("bundle", "tensorrt_rtx")


def test_an_existing_directory_is_left_alone(model, tmp_path):
    code, _, err = invoke("bundle", model, "--target", "jetson-orin", "-o", tmp_path)
    assert (code, err.splitlines()[0]) == (1, f"error: {tmp_path} already exists")
