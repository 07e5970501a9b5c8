"""What is on the page, told from its text; `test_in_chromium.py` looks at it as people do."""

import dataclasses
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_spec.errors import UserError
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from report.artifacts import collect
from report.chain import chain
from report.commands import commands, missing
from report.expert_map import MOST_CELLS
from report.report import MAX_LOSS, report
from report.variants import variants_of
from report.verdict import judge
from runtime.verification.report import ParityReport
from tests.cli.helpers import invoke
from tests.report import runs
from tests.runtime.tiny import SOURCE

SIX_MEGABYTES = 6_000_000
IMAGES = (4, 1, 12, 12)


def text_of(path):
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", path.read_text(encoding="utf-8"))))


def verdict_of(directory, max_loss=MAX_LOSS):
    artifacts = collect(directory)
    return judge(artifacts, variants_of(artifacts), max_loss)


def page_of(directory, tmp_path):
    report(directory, tmp_path / "page.html")
    return text_of(tmp_path / "page.html")


def test_the_same_artifacts_give_the_same_bytes_wherever_they_lie(run_directory, page_file, tmp_path):
    copy = shutil.copytree(run_directory, tmp_path / "elsewhere" / run_directory.name)
    report(copy, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page_file.read_bytes()
    assert str(run_directory.parent) not in page_file.read_text(encoding="utf-8")


def test_a_run_is_told_with_its_numbers(run_directory, page_file):
    text = text_of(page_file)
    for name in runs.KEEPS:
        accuracy = ParityReport.load(run_directory / name / "parity.json").accuracy
        assert accuracy is not None
        assert f"{100 * accuracy.candidate:.1f}\N{NO-BREAK SPACE}%" in page_file.read_text(encoding="utf-8")
    assert "Not in this directory" not in text
    assert "All 3 verified variants compute what their references compute." in text


@pytest.mark.parametrize(("max_loss", "state"), [(1.0, "ship"), (0.0, "costs")])
def test_the_verdict_follows_its_rule(run_directory, max_loss, state):
    verdict = verdict_of(run_directory, max_loss)
    assert (verdict.state, verdict.chosen) == (state, "one" if state == "ship" else None)
    assert verdict.baseline.examples == 40


def test_every_variant_is_decided_on(run_directory):
    verdict = verdict_of(run_directory, 1.0)
    assert verdict.decisions == {"whole": "unpruned", "three": "ship", "one": "ship"}
    assert verdict_of(run_directory, 0.0).decisions["one"] == "costs"


def test_what_failed_is_said_first_with_the_layer_to_blame(tmp_path):
    runs.failing(tmp_path / "run")
    verdict = report(tmp_path / "run", tmp_path / "page.html")
    assert verdict.state == "fails"
    assert verdict.headline == "optimized does not compute what it should"
    assert re.search(r"^optimized: layer blocks\.1\.moe: .*; \d+ findings? under Parity$", verdict.reasons[0])
    assert "The first layer that went wrong is blocks.1.moe ." in text_of(tmp_path / "page.html")


def test_a_file_that_changed_is_found(run_directory, tmp_path):
    copy = shutil.copytree(run_directory, tmp_path / "run")
    data = copy / "three" / "optimized" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    verdict = verdict_of(copy, max_loss=1.0)
    assert (verdict.state, verdict.headline) == ("fails", "1 model changed after it was made")
    assert verdict.reasons[0].startswith("three/optimized: ")


def test_an_empty_directory_is_told_as_one(tmp_path):
    (tmp_path / "run").mkdir()
    verdict = report(tmp_path / "run", tmp_path / "page.html")
    assert (verdict.state, verdict.headline) == ("unverified", "Nothing was verified yet")
    text = text_of(tmp_path / "page.html")
    assert text.count("Not in this directory") == 8
    verbs = [verb for verb, _ in missing(collect(tmp_path / "run"))]
    assert verbs == ["calibrate", "plan", "export", "optimize", "build", "verify", "bench"]


def test_stages_may_be_missing_one_after_the_other(run_directory, tmp_path):
    """What is missing grows; the page is made each time, and says so."""
    copy, said = shutil.copytree(run_directory, tmp_path / "run"), []
    for step, gone in enumerate((("statistics.safetensors", "bench.json"), ("*/parity.json",), ("*/optimized",))):
        for path in (path for pattern in gone for path in copy.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        report(copy, tmp_path / f"{step}.html")
        said.append(text_of(tmp_path / f"{step}.html").count("Not in this directory"))
    assert said == [2, 5, 7]


def test_what_cannot_be_read_is_listed(run_directory, tmp_path):
    copy = shutil.copytree(run_directory, tmp_path / "run")
    (copy / "bench.json").write_text('{"artifact": "bench", "schema": 99}')
    text = page_of(copy, tmp_path)
    assert "Could not be read bench.json" in text
    assert "has bench schema 99, this moe-edge reads 1" in text


def test_an_accuracy_without_that_of_the_unpruned_model_is_no_verdict(run_directory, tmp_path):
    copy = shutil.copytree(run_directory, tmp_path / "run")
    (copy / "whole" / "parity.json").unlink()
    verdict = verdict_of(copy)
    assert (verdict.state, verdict.baseline) == ("proven", None)
    assert "moe-edge verify EXPORTED --reference CHECKPOINT" in verdict.reasons[-1]


def test_markup_in_names_is_text(hostile_file):
    page = hostile_file.read_text(encoding="utf-8")
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in page
    assert text_of(hostile_file).count("window.hacked = 1") > 10


def test_the_largest_models_fit_a_page(tmp_path):
    """61 layers of 384 experts, kept by three plans: what the page has no room for is said, and it stays small."""
    names = [f"model.layers.{index}.mlp" for index in range(61)]
    for keep in (192, 96, 48):
        layers = [LayerPlan(name, 384, 8, tuple(range(keep)), tuple(map(float, range(384)))) for name in names]
        PruningPlan(SOURCE, "reap", tuple(layers)).save(tmp_path / "run" / f"{keep}.json")
    left_out = f"2 further maps are left out: this page holds {MOST_CELLS:,} experts"
    assert left_out in page_of(tmp_path / "run", tmp_path)
    assert (tmp_path / "page.html").stat().st_size < SIX_MEGABYTES


def test_scores_that_are_no_numbers_are_shown_as_such(tmp_path):
    scores = (float("nan"), float("inf"), 1.0, 2.0)
    layers = tuple(dataclasses.replace(layer, scores=scores) for layer in runs.plan((2, 3)).layers)
    (tmp_path / "run").mkdir()
    made = runs.plan((2, 3)).to_json() | {"layers": [layer.to_json() for layer in layers]}
    (tmp_path / "run" / "plan.json").write_text(json.dumps(made | {"artifact": "plan", "schema": 2}))
    assert "dropped; nan" in page_of(tmp_path / "run", tmp_path)


def test_links_and_hidden_folders_are_left_alone(run_directory, tmp_path):
    (tmp_path / "run" / ".hidden").mkdir(parents=True)
    shutil.copy(run_directory / "bench.json", tmp_path / "run" / ".hidden" / "bench.json")
    (tmp_path / "run" / "bench.json").symlink_to(run_directory / "bench.json")
    assert collect(tmp_path / "run").benches == ()


def test_every_link_of_the_chain_is_a_hash(run_directory):
    artifacts = collect(run_directory)
    (root,) = chain(artifacts)
    assert root.sha256 == SOURCE
    by_path = {node.path: node for node in root.children}
    (engine,) = by_path["one/optimized"].children
    assert (engine.kind, engine.path) == ("engine", "one/engine")
    assert Manifest.load(run_directory / engine.path).parent_sha256 == by_path["one/optimized"].sha256


def test_variants_have_the_names_of_their_folders(run_directory):
    found = variants_of(collect(run_directory))
    assert [(variant.label, variant.experts, variant.criterion) for variant in found] == [
        ("whole", 4, "unpruned"),
        ("three", 3, "gate-mass"),
        ("one", 1, "gate-mass"),
    ]
    assert [len(variant.engines) for variant in found] == [0, 0, 1]


def test_the_copy_in_a_bundle_names_no_variant(run_directory, tmp_path):
    copy = shutil.copytree(run_directory, tmp_path / "run")
    shutil.copytree(copy / "three" / "optimized", copy / "bundle" / "model")
    dataclasses.replace(Manifest.load(copy / "three" / "optimized"), kind="bundle", files=()).save(copy / "bundle")
    assert [variant.label for variant in variants_of(collect(copy))] == ["whole", "three", "one"]


def test_the_commands_name_every_artifact(run_directory):
    lines = [step.command for step in commands(collect(run_directory))]
    assert lines[0] == "moe-edge calibrate MODEL --data DATA-data.npz -o statistics.safetensors"
    assert "moe-edge plan MODEL --criterion gate-mass --keep 3 -o three/plan.json" in lines
    assert "moe-edge optimize MODEL --plan three/plan.json -o three/optimized" in lines
    assert "moe-edge build one/optimized --target onnxruntime-cpu -o one/engine" in lines
    assert "moe-edge verify one/optimized --reference MODEL --data DATA-data-has.npz -o one/parity.json" in lines
    bench = "moe-edge bench whole/optimized three/optimized one/optimized --batch-size 1 --threads 0 -o bench.json"
    assert lines[-1] == bench


OPTIONS = {
    "w8a8": "--precision int8 --activations int8 --calibration DATA.npz --percentile 99.5",
    "halves": "--precision int4 --rest-precision fp16 --form gather --forced --observe-experts --no-prove",
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_commands_make_the_same_bytes_whatever_a_graph_was_asked_for(options, zoo, tmp_path, monkeypatch):
    np.savez(tmp_path / "DATA.npz", pixel_values=np.random.default_rng(0).normal(size=IMAGES).astype(np.float32))
    outside = {"CHECKPOINT": zoo.checkpoint("vmoe"), "MODEL": zoo.exported("vmoe"), "DATA.npz": tmp_path / "DATA.npz"}
    made = ["plan MODEL --experts 0,2,5 -o plan.json", f"optimize MODEL --plan plan.json {options} -o small"]
    for folder in (tmp_path / "run", tmp_path / "again"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        for name, path in outside.items():
            Path(name).symlink_to(path)
        for line in made:
            code, _, err = invoke(*line.removeprefix("moe-edge ").split())
            assert code == 0, (line, err)
        made = [step.command for step in commands(collect(folder))]
    for name in ("plan.json", "small/manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_the_command_says_what_the_page_does(run_directory, tmp_path):
    code, out, err = invoke("report", run_directory, "-o", tmp_path / "page.html", "--max-loss", "100%")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"one may ship: {tmp_path}/page.html"
    (tmp_path / "empty").mkdir()
    code, out, _ = invoke("report", tmp_path / "empty", "-o", tmp_path / "other.html", "--json")
    assert (code, json.loads(out)["output"]) == (0, f"{tmp_path}/other.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{tmp}/none", "-o", "{tmp}/page.html"],
            "error: {tmp}/none does not exist, expected a directory with artifacts\n"
            "hint: moe-edge demo -o demo-output\n",
        ),
        (
            ["{tmp}", "-o", "{tmp}/page.html", "--max-loss", "much"],
            "error: --max-loss 'much' is no number\nhint: give a share or percents: --max-loss 2%\n",
        ),
        (
            ["{tmp}", "-o", "{tmp}/page.html", "--max-loss", "2"],
            "error: a loss of 2 is no share of 1\nhint: give a share or percents: --max-loss 2%\n",
        ),
        (
            ["{tmp}", "-o", "{tmp}"],
            "error: {tmp} already exists\nhint: give another -o, or remove it first: rm -r {tmp}\n",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, message):
    code, out, err = invoke("report", *(argument.format(tmp=tmp_path) for argument in arguments))
    assert (code, out, err) == (1, "", message.format(tmp=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_directory(page_file, tmp_path):
    message = f"{page_file} is a file, expected a directory with artifacts\nhint: moe-edge demo -o demo-output"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        report(page_file, tmp_path / "page.html")
