import dataclasses
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from filelock import FileLock
from rich.console import Console

from cli import journey
from cli.demo import _table, _targets
from cli.journey import BATCHES, KEEPS, RECIPE, RECOVERED, TARGETS, TRAINED, Row
from models.vmoe.assets import fashion_mnist
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.identity import checkpoint_sha256
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from report.artifacts import collect
from report.commands import commands
from report.names import Names
from report.words import milliseconds, percent
from runtime.bench_report import BenchReport
from runtime.run import run
from runtime.verification.report import ParityReport
from tests.cli.helpers import INTERRUPTIBLE, invoke, leftovers
from tests.markdown import is_abridged, read_blocks
from tests.test_readme import README

TEST_IMAGES = fashion_mnist() / "test.npz"
STEPS = [
    "· calibrate on 1,000 training images",
    "· export to ONNX and compare with torch",
    *(f"· keep {keep} of 8 experts: plan, optimise, verify" for keep in KEEPS),
    "· train what 2 experts can do: prune, finetune, export, optimise, verify",
    "· bench, batch sizes 1, 64",
    "· report",
]

every_keep = pytest.mark.parametrize("keep", KEEPS)


@pytest.fixture(scope="module")
def demo(zoo):
    """The directory of a whole demo without engines, and its rows as printed for machines; one worker runs it, once."""
    out, printed = zoo.root / "demo", zoo.root / "demo.printed.json"
    with FileLock(zoo.root / "demo.lock"):
        if not printed.exists():
            printed.write_text(run_demo(out))
    payload = json.loads(printed.read_text())
    assert payload["output"] == str(out)
    return out, [Row(**row) for row in payload["rows"]]


def run_demo(out):
    threads = torch.get_num_threads()
    code, stdout, stderr = invoke("demo", "--no-engines", "--json", "-o", out)
    assert (code, stderr.splitlines()) == (0, STEPS)
    assert len(STEPS) == journey.STEPS + 1  # with the report
    assert torch.get_num_threads() == threads
    assert list(out.parent.glob(".demo.*")) == []
    return stdout


def test_without_tensorrt_rtx_there_are_no_engines_unless_they_were_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert _targets(asked=False) == ()
    assert capsys.readouterr().err.startswith("· no engines: tensorrt_rtx cannot be imported: ")
    with pytest.raises(UserError, match=r"^no engine can be built here: .*\nhint: leave them out: .* --no-engines$"):
        _targets(asked=True)


def test_each_row_says_what_ran(demo):
    _, rows = demo
    assert [row.experts for row in rows] == [8, *KEEPS, RECOVERED]
    assert [row.parity for row in rows] == ["reference", *["PASS"] * 6]
    assert (rows[0].model, rows[-2].model, rows[-1].model) == ("torch", "ONNX, ffn", "ONNX, tuned")
    assert [row.engine_bytes for row in rows] == [None] * 7
    assert {tuple(row.latency_ms) for row in rows} == {tuple(map(str, BATCHES))}
    assert all(latency > 0 for row in rows for latency in row.latency_ms.values())


def test_fewer_experts_are_fewer_bytes(demo):
    root, (_, *rows, tuned) = demo
    sizes = [row.onnx_bytes for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    files = [root / f"keep-{keep}" / "optimized" / "model.onnx" for keep in KEEPS]
    assert sizes == [file.stat().st_size + file.with_name("model.onnx.data").stat().st_size for file in files]
    assert tuned.onnx_bytes == pytest.approx(sizes[KEEPS.index(RECOVERED)], rel=1e-3)


@every_keep
def test_the_accuracy_is_what_the_graph_reaches_and_what_verify_measured(keep, demo):
    root, rows = demo
    row = rows[1 + KEEPS.index(keep)]
    labels = np.load(TEST_IMAGES)["labels"]
    logits = run(root / f"keep-{keep}" / "optimized", [TEST_IMAGES]).outputs["logits"]
    assert row.accuracy == (logits.argmax(-1) == labels).mean()
    report = ParityReport.load(root / f"keep-{keep}" / "parity.json")
    assert report.passed
    assert report.accuracy is not None
    assert (report.accuracy.candidate, report.accuracy.examples) == (row.accuracy, len(labels))
    assert report.flips == row.flips


def test_training_recovers_most_of_what_two_experts_alone_lost(demo):
    root, (whole, *rows, tuned) = demo
    pruned = rows[KEEPS.index(RECOVERED)]
    labels = np.load(TEST_IMAGES)["labels"]
    logits = run(root / TRAINED / "optimized", [TEST_IMAGES]).outputs["logits"]
    assert tuned.accuracy == (logits.argmax(-1) == labels).mean()
    assert pruned.accuracy < 0.75 < 0.9 < tuned.accuracy < whole.accuracy
    record = json.loads((root / TRAINED / "checkpoint" / "finetuning.json").read_text())
    assert (record["method"], record["recipe"]["steps"]) == ("plain", RECIPE.steps)
    assert record["model_sha256"] == checkpoint_sha256(root / TRAINED / "pruned")
    assert leftovers(root / TRAINED) == {"pruned", "checkpoint", "exported", "optimized", "parity.json"}


def test_all_experts_are_as_accurate_as_torch(demo):
    _, (by_torch, everything, *_) = demo
    assert by_torch.accuracy == everything.accuracy


@every_keep
def test_every_artifact_is_there_and_chained_to_its_parent(keep, demo):
    root, _ = demo
    folder = root / f"keep-{keep}"
    assert leftovers(folder) == {"optimized", "parity.json", "plan.json"}
    plan = PruningPlan.load(folder / "plan.json")
    manifest = Manifest.load(folder / "optimized")
    manifest.check_files(folder / "optimized")
    assert plan.statistics_sha256 is not None
    assert (manifest.plan, {len(layer.keep) for layer in plan.layers}) == (plan, {keep})
    assert [block.keep for block in manifest.blocks] == [layer.keep for layer in plan.layers]
    assert manifest.parent_sha256 == sha256_file(root / "exported" / "manifest.json")
    assert manifest.source_sha256 == plan.model_sha256 == checkpoint_sha256(fashion_mnist())
    assert {"config.json", "observed.onnx", "preprocessor_config.json"} <= leftovers(folder / "optimized")


def test_the_directory_holds_the_rows_too(demo):
    root, rows = demo
    folders = {TRAINED, *(f"keep-{keep}" for keep in KEEPS)}
    assert leftovers(root) == {"bench.json", "demo.json", "exported", "report.html", "statistics.safetensors", *folders}
    assert [Row(**row) for row in json.loads((root / "demo.json").read_text())["rows"]] == rows


def test_the_report_has_the_accuracy_and_the_latency_of_every_row(demo):
    root, (_, *rows) = demo
    page = (root / "report.html").read_text(encoding="utf-8")
    costs = {(row.model, row.batch_size): row.median_ms for row in BenchReport.load(root / "bench.json").rows}
    for folder, row in zip((*(f"keep-{keep}" for keep in KEEPS), TRAINED), rows, strict=True):
        assert f"{folder}: {percent(row.accuracy)} with {row.experts} experts a layer" in page
        latency = {str(size): costs[f"{folder}/optimized", size] for size in BATCHES}
        assert latency == row.latency_ms
        assert all(milliseconds(value) in page for value in latency.values())


def test_one_expert_is_a_dense_graph_without_a_router(demo):
    root, _ = demo
    graph = onnx.load(root / "keep-1" / "optimized" / "model.onnx", load_external_data=False).graph
    ops = {node.op_type for node in graph.node}
    assert not ops & {"TopK", "GatherElements", "ScatterElements", "Equal"}
    assert {node.domain for node in graph.node} == {""}
    assert [tensor.name for tensor in graph.initializer if "router" in tensor.name] == []
    blocks = Manifest.load(root / "keep-1" / "optimized").blocks
    assert [(block.form, block.router, block.gates) for block in blocks] == [("ffn", "", None)] * 2


def test_one_variant_may_ship_and_others_may_not(demo):
    """The rule is the report's own, 1 point at most; the figures are what the model and the test images give."""
    root, _ = demo
    verdict = json.loads((root / "demo.json").read_text())["verdict"]
    assert (verdict["state"], verdict["chosen"], verdict["max_loss"]) == ("ship", "keep-6", 0.01)
    decisions = {**dict.fromkeys([TRAINED, "keep-4", "keep-2", "keep-1"], "costs"), "keep-8": "unpruned"}
    assert verdict["decisions"] == {**decisions, "keep-6": "ship"}


def test_the_commands_on_the_page_make_the_same_files(demo, tmp_path, monkeypatch):
    """In an empty directory, from the checkpoint on; training and times are left out, they take long or differ."""
    root, _ = demo
    artifacts = collect(root)
    data = {sha256_file(path): path for path in (TEST_IMAGES, fashion_mnist() / "calibration.npz")}
    monkeypatch.chdir(tmp_path)
    for name, sha256 in Names(artifacts).outside.items():
        Path(name).symlink_to(data.get(sha256, fashion_mnist()))
    made = {"statistics.safetensors", "keep-2/plan.json", "keep-4/plan.json", "exported", "keep-4/optimized"}
    made |= {"keep-4/parity.json", f"{TRAINED}/pruned"}
    steps = [step for step in commands(artifacts) if step.makes in made]
    assert {step.makes for step in steps} == made
    for step in steps:
        code, _, stderr = invoke(*shlex.split(step.command)[1:])
        assert code == 0, (step.command, stderr)
    again = [path for name in made for path in (Path(name), *Path(name).rglob("*")) if path.is_file()]
    assert [path for path in again if path.read_bytes() != (root / path).read_bytes()] == []


def test_the_table_fits_a_terminal_of_80_columns(demo):
    _, rows = demo
    out = io.StringIO()
    Console(file=out, width=80).print(_table(rows))
    lines = [line.split()[-8:] for line in out.getvalue().splitlines() if line.startswith(("torch", "ONNX,"))]
    assert [line[:3] for line in lines] == [[str(row.experts), f"{row.accuracy:.1%}", row.parity] for row in rows]
    assert "…" not in out.getvalue()


def test_readme_shows_what_a_demo_prints(demo):
    """But for engines, of which here are none, and for what times are."""
    root, rows = demo
    (shown,) = [block.text for block in read_blocks(README) if "V-MoE on Fashion-MNIST" in block.text]
    table, verdict = shown.rstrip().rsplit("\n", 1)
    out = io.StringIO()
    built = [dataclasses.replace(row, engine_bytes=row.onnx_bytes) for row in rows]
    Console(file=out, width=80).print(_table(built))
    assert is_abridged(table, out.getvalue())
    assert verdict.startswith(json.loads((root / "demo.json").read_text())["verdict"]["headline"])


def test_an_output_that_exists_is_left_as_it_is(tmp_path):
    assert invoke("demo", "-o", tmp_path) == (
        1,
        "",
        f"error: {tmp_path} already exists\nhint: give another -o, or remove it first: rm -r {tmp_path}\n",
    )
    assert leftovers(tmp_path) == set()


def test_engines_are_built_for_three_generations():
    assert TARGETS == ("rtx-ampere", "rtx-ada", "rtx-blackwell")


COMMAND = INTERRUPTIBLE + "from cli.main import main; main()"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_kill_in_the_middle_leave_nothing(tmp_path, commands, sent, code):
    arguments = [commands / "python", "-c", COMMAND, "demo", "--no-engines", "-o", str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob(".out.*/statistics.safetensors")):
            time.sleep(0.01)
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (code, "")
    assert stderr.splitlines()[-1] == "interrupted; nothing half-written is left"
    assert leftovers(tmp_path) == set()
