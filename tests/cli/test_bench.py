import json
import re

import numpy as np
import pytest

from runtime.bench_report import BenchReport
from runtime.measuring.pinning import cores
from tests.cli.helpers import invoke
from tests.cli.interrupt import ctrl_c
from tests.runtime import tiny


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def test_models_are_timed_side_by_side(model):
    code, out, _ = invoke("bench", model, model / "model.onnx", "--batch-size", 1, "--repeats", 2, "--json")
    report = json.loads(out)
    assert code == 0
    assert [(row["model"], row["batch_size"]) for row in report["rows"]] == [
        (str(model), 1),
        (f"{model}/model.onnx", 1),
    ]
    assert (report["threads"], report["cores"]) == (1, list(cores()[-1:]))
    assert "onnxruntime" in report["machine"]


def test_threads_may_be_left_where_they_are(model):
    report = json.loads(invoke("bench", model, "--batch-size", 1, "--repeats", 1, "--no-pin", "--json")[1])
    assert report["cores"] == []


def test_people_get_a_table_and_a_file(model, tmp_path):
    arguments = ("bench", model, "--batch-size", 2, "--repeats", 1, "-o", tmp_path / "bench.json")
    code, out, _ = invoke(*arguments)
    assert code == 0
    assert [row.model for row in BenchReport.load(tmp_path / "bench.json").rows] == [str(model)]
    assert invoke(*arguments)[2].startswith(f"error: {tmp_path}/bench.json already exists\n")
    assert re.search(r"; threads: 1, on cores: (\d+|any)\n$", out)
    assert re.search(r"model +batch +p50 ms +p99 ms +examples/s +load ms +MiB +file MB", out)


def test_task_data_may_be_fed(model, tmp_path):
    np.savez(tmp_path / "data.npz", x=tiny.examples(3))
    arguments = ("bench", model, "--repeats", 1, "--data", tmp_path / "data.npz", "--batch-size")
    assert invoke(*arguments, 3)[0] == 0
    code, _, err = invoke(*arguments, 4)
    assert (code, err.splitlines()[-2:]) == (
        1,
        ["error: the data holds 3 examples, asked for 4 at once", "hint: give more data"],
    )


def test_a_missing_model_is_named(tmp_path):
    code, _, err = invoke("bench", tmp_path / "no.onnx")
    assert code == 1
    assert err.endswith(
        f"error: {tmp_path}/no.onnx does not exist, expected an .onnx file or a model directory\nhint: check the path\n"
    )


def test_ctrl_c_ends_it(model, tmp_path):
    before = sorted(tmp_path.iterdir())
    with ctrl_c():
        code, out, _ = invoke("bench", model, "--repeats", 10_000_000)
    assert (code, out, sorted(tmp_path.iterdir())) == (130, "", before)


def test_a_provider_is_named_and_a_cache_is_filled(model, tmp_path):
    timed = ("bench", model, "--batch-size", 1, "--repeats", 1, "--cache", tmp_path / "cache", "--provider", "cpu")
    code, out, _ = invoke(*timed)  # both in this process and in the one that is measured
    assert (code, out.splitlines()[-1]) == (0, "  note: models were computed by cpu")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert invoke("bench", model, "--provider", "gpu")[2].startswith("error: 'gpu' is no execution provider\n")
