import re

import pytest

from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from runtime.bench import row_of
from runtime.bench_report import BenchReport
from runtime.measuring.machine import describe_machine
from runtime.measuring.memory import Alone
from tests.runtime import tiny

ROW = row_of("model.onnx", 4, [1.0, 2.0, 4.0], Alone(load_ms=8.0, peak_bytes=None), 16, tokens=20)


def test_a_row_is_what_the_times_come_to():
    assert (ROW.median_ms, ROW.examples_per_second, ROW.tokens_per_second) == (2.0, 2000.0, 10_000.0)
    assert (ROW.p90_ms, ROW.p99_ms) == pytest.approx((3.6, 3.96))
    assert (ROW.load_ms, ROW.memory_bytes, ROW.file_bytes) == (8.0, None, 16)


def test_a_report_is_the_same_after_a_round_trip(tmp_path):
    report = BenchReport((ROW,), {"model": "0" * 64}, "2 cores of a kind", threads=2, cores=(1, 3), notes=("a note",))
    report.save(tmp_path / "bench.json")
    assert BenchReport.load(tmp_path / "bench.json") == report


def test_models_are_known_by_their_manifests(tmp_path):
    model = tiny.write(tmp_path / "model")
    report = BenchReport.of(row_of(str(path), 1, [1.0], Alone(1.0, None), 1) for path in (model, model / "model.onnx"))
    assert report.models == {str(model): sha256_file(model / "manifest.json")}
    assert report.machine == describe_machine()


def test_what_is_no_report_is_refused(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text('{"artifact": "bench", "schema": 1, "rows": []}')
    message = f"{path}: key 'models' is missing\nhint: make it again with `moe-edge bench MODEL... -o bench.json`"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        BenchReport.load(path)
