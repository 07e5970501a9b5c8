"""Every verb that may take long tells how far it is, from 0 to the end of each phase."""

import json
from contextlib import contextmanager

import numpy as np
import pytest

from cli import console
from pruning.options import PlanOptions
from pruning.plan import plan
from tests.cli.helpers import done, invoke
from tests.cli.terminal import Terminal
from tests.heard import Heard

PHASES = {
    "calibrate {checkpoint} --data {data} -o {out}.safetensors": ["hashing files", "calibrating"],
    "plan {checkpoint} --data {data} --keep 4 -o {out}.json": ["looking at the data"],
    "prune {checkpoint} --plan {plan} -o {out}": ["hashing files", "writing weights"],
    "optimize {exported} --target onnxruntime-cpu -o {out}": [
        "writing weights",
        "running model.onnx",
        "running observed.onnx",
    ],
    "bundle {optimized} --target onnxruntime-cpu -o {out}": [
        "hashing files",
        "running golden cases",
        "copying the model",
    ],
    "verify {optimized} --reference {exported}": ["hashing files", "comparing outputs"],
    "bench {exported} --repeats 2 --warmup 1 --batch-size 2": ["timing 2 examples a run", "measuring memory"],
    "run {exported} --input {data}": ["running data.npz"],
    "merge {statistics} -o {out}.safetensors": ["adding up statistics"],
}
"""What a V-MoE makes each verb tell, in order."""


@pytest.fixture(scope="module")
def files(zoo, tmp_path_factory):
    directory = tmp_path_factory.mktemp("progress")
    names = ("data.npz", "statistics.safetensors", "plan.json", "optimized")
    data, statistics, made, optimized = (directory / name for name in names)
    np.savez(data, pixel_values=np.random.default_rng(0).standard_normal((5, 1, 12, 12)).astype(np.float32))
    done("calibrate", zoo.checkpoint("vmoe"), "--data", data, "-o", statistics)
    plan(statistics, PlanOptions(4), made)
    done("optimize", zoo.exported("vmoe"), "--target", "onnxruntime-cpu", "-o", optimized)
    return {
        "checkpoint": zoo.checkpoint("vmoe"),
        "data": data,
        "exported": zoo.exported("vmoe"),
        "optimized": optimized,
        "plan": made,
        "statistics": statistics,
    }


@pytest.mark.parametrize("command", PHASES, ids=lambda command: command.split()[0])
def test_each_phase_counts_up_to_its_end(command, files, tmp_path, monkeypatch):
    heard = Heard()

    @contextmanager
    def progress(what, *, ticking=True):
        heard(what)
        yield heard

    monkeypatch.setattr(console, "progress", progress)
    done(*command.format(out=tmp_path / "out", **files).split())
    assert heard.to_the_end() == PHASES[command]


def test_a_narrow_terminal_shows_it_on_one_line_and_json_is_json(files, monkeypatch):
    shown = Terminal(40)
    monkeypatch.setattr(console, "err", shown.console)
    monkeypatch.setattr(console, "_PATIENCE", -1.0)
    code, stdout, _ = invoke("verify", files["optimized"], "--reference", files["exported"], "--json")
    assert code == 0
    assert json.loads(stdout)["passed"]
    frames = [line for line in shown.lines() if line]
    assert any(frame.startswith("comparing outputs ") for frame in frames)
    assert {len(frame) for frame in frames} == {38}
    assert shown.line() == ""
