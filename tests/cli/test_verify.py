import dataclasses
import importlib.util
import json
import re
import shutil

import numpy as np
import onnx
import pytest

from benchmarks.planted import FAULTS, plant
from graph_passes.optimize import optimize
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.identity import onnx_sha256
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import Manifest
from moe_spec.plan import PruningPlan
from runtime.onnxruntime.backend import OnnxRuntimeRunner
from runtime.verification.report import ParityReport
from tests.cli.helpers import invoke
from tests.cli.interrupt import ctrl_c
from tests.runtime import tiny
from tests.runtime.tiny import Tiny


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", x=tiny.examples(20), labels=np.arange(20) % 3)
    return tmp_path / "data.npz"


def test_a_copy_passes_and_its_report_is_written(model, tmp_path, data):
    copy = tiny.write(tmp_path / "copy")
    code, out, _ = invoke("verify", copy, "--reference", model, "--data", data, "-o", tmp_path / "parity.json")
    report = ParityReport.load(tmp_path / "parity.json")
    assert code == 0
    assert report.accuracy is not None
    accuracy = f"{report.accuracy.candidate:.1%}"
    assert out.splitlines()[0] == (
        f"PASS: 20 examples of task data, float32, 0 flips, accuracy {accuracy} (reference {accuracy})"
    )
    assert "  blocks.1.moe: 0 of 100 tokens flip, 0 without excuse, agreement 1.0000, gates differ by 0\n" in out


def test_a_fault_ends_with_exit_code_3_after_the_report_is_written(model, tmp_path):
    broken = tiny.write(tmp_path / "broken", Tiny(head=1.5))
    code, out, err = invoke("verify", broken, "--reference", model, "-o", tmp_path / "parity.json", "--json")
    assert code == 3
    assert json.loads(out)["passed"] is False
    (reason,) = ParityReport.load(tmp_path / "parity.json").reasons
    assert err.endswith(f"verification failed: {reason}; the routers of all layers agree\n")


def test_both_are_timed_and_measured_when_asked(model, tmp_path, data):
    copy, path = tiny.write(tmp_path / "copy"), tmp_path / "parity.json"
    code, out, _ = invoke("verify", copy, "--reference", model, "--data", data, "--cost", "-o", path)
    report = ParityReport.load(path)
    assert code == 0
    examples = 20  # all that the data has, which is less than a batch
    assert [(row.model, row.batch_size) for row in report.cost] == [(str(model), examples), (str(copy), examples)]
    lines = [line for line in out.splitlines() if "MiB RAM" in line]
    measured = r": [\d.]+ ms for 20 examples, (-|[\d.]+) MiB RAM, [\d,]+ bytes"
    assert re.fullmatch(f"  {re.escape(str(model))}{measured}", lines[0])


def test_what_fails_behind_the_comparison_is_a_note_of_its_report(model, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise UserError("the disk is full", hint="free some of it")

    monkeypatch.setattr("graph_passes.variants.cut.save_watched", fail)
    monkeypatch.setattr("cli.judge.bench", fail)
    broken, path = tiny.write(tmp_path / "broken", Tiny(head=1.5)), tmp_path / "parity.json"
    assert invoke("verify", broken, "--reference", model, "--cost", "-o", path)[0] == 3
    assert ParityReport.load(path).notes == (
        "the part at fault is not known: the disk is full",
        "what both cost is not known: the disk is full",
    )


def test_the_first_layer_that_went_wrong_is_named(model, tmp_path):
    code, _, err = invoke("verify", tiny.write(tmp_path / "rolled", Tiny(rolled=1)), "--reference", model)
    assert code == 3
    assert err.endswith("; the first layer that went wrong is blocks.1.moe\n")


def test_a_precision_may_be_chosen_to_judge_by(model, tmp_path):
    half = tiny.write(tmp_path / "half", Tiny(dtype="float16"))
    assert invoke("verify", half, "--reference", model)[0] == 0
    for name in ("fp32", "float32"):
        assert invoke("verify", half, "--reference", model, "--precision", name)[0] == 3
    assert invoke("verify", half, "--reference", model, "--precision", "fp61") == (
        1,
        "",
        "error: unknown precision 'fp61'\n"
        "hint: did you mean 'fp16'? known: bf16, fp16, fp32, fp8, int4, int8, nvfp4, w8a8\n",
    )


def test_an_existing_report_is_not_overwritten(model, tmp_path):
    (tmp_path / "parity.json").write_text("mine")
    code, _, err = invoke("verify", model, "--reference", model, "-o", tmp_path / "parity.json")
    path = tmp_path / "parity.json"
    assert (code, err) == (
        1,
        f"error: {path} already exists\nhint: give another -o, or remove it first: rm -r {path}\n",
    )
    assert path.read_text() == "mine"


def test_a_missing_candidate_is_named(model, tmp_path):
    code, _, err = invoke("verify", tmp_path / "no", "--reference", model)
    assert code == 1
    assert err.endswith(
        f"error: {tmp_path}/no is no model or engine directory\n"
        "hint: give a directory that `moe-edge export`, `optimize` or `build` wrote\n"
    )


def test_weights_that_were_cut_are_named(model, tmp_path):
    copy = tiny.write(tmp_path / "copy")
    (copy / "model.onnx.data").write_bytes((copy / "model.onnx.data").read_bytes()[:-1])
    code, _, err = invoke("verify", copy, "--reference", model)
    assert code == 1
    assert err.endswith(
        f"error: {copy}/model.onnx.data has 8543 bytes, manifest.json says 8544\n"
        "hint: make the directory again with the command that made it\n"
    )


def test_ctrl_c_leaves_no_report(model, tmp_path):
    np.savez(tmp_path / "data.npz", x=tiny.examples(100_000))
    before = sorted(tmp_path.iterdir())
    with ctrl_c():
        arguments = ("--reference", model, "--data", tmp_path / "data.npz", "--batch-size", 1)
        code, out, _ = invoke("verify", model, *arguments, "-o", tmp_path / "parity.json")
    assert (code, out) == (130, "")
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def pruned(zoo, tmp_path):
    """A real model without half of its experts, and the model that it was made from."""
    exported = zoo.exported("mixtral")
    manifest = Manifest.load(exported)
    layers = tuple(LayerPlan(block.name, block.experts, block.top_k, (0, 2, 3, 5)) for block in manifest.blocks)
    plan = PruningPlan(manifest.source_sha256, "manual", layers)
    optimize(exported, tmp_path / "pruned", OnnxRuntimeRunner(threads=1), plan=plan, accepted=["dense"])
    return tmp_path / "pruned", exported


def test_a_pruned_model_is_compared_with_its_parent_masked_by_the_plan_in_its_manifest(pruned, tmp_path):
    candidate, exported = pruned
    code, out, _ = invoke("verify", candidate, "--reference", exported, "-o", tmp_path / "parity.json")
    assert code == 0
    assert out.startswith("PASS: 8 examples of random feeds at the shapes 1x1, 2x7, 5x4, float32, 0 flips\n")
    report = ParityReport.load(tmp_path / "parity.json")
    assert report.flips == 0
    known = tuple(sha256_file(model / "manifest.json") for model in (candidate, exported))
    assert (report.candidate_sha256, report.reference_sha256) == known  # not those of what was made of them


def test_a_pruned_model_fails_against_another_plan(pruned, tmp_path):
    candidate, exported = pruned
    applied = Manifest.load(candidate).plan
    assert applied is not None
    layers = tuple(dataclasses.replace(layer, keep=(0, 2, 3, 6)) for layer in applied.layers)
    dataclasses.replace(applied, layers=layers).save(tmp_path / "plan.json")
    code, _, err = invoke("verify", candidate, "--reference", exported, "--plan", tmp_path / "plan.json")
    assert code == 3
    assert err.endswith(
        "; the fault is in the router of layer model.layers.0.mlp: it selects other experts for 14 of 20 tokens\n"
    )


def test_a_fault_of_a_pruned_model_is_named_by_the_ids_of_its_parent(pruned, tmp_path):
    candidate, exported = pruned
    broken = plant(candidate, tmp_path / "broken", FAULTS["two experts swapped"], 1)
    shutil.copyfile(candidate / "manifest.json", broken.parent / "manifest.json")
    _, out, _ = invoke("verify", broken, "--reference", exported, "--json")
    fault = json.loads(out)["fault"]
    assert (fault["layer"], fault["experts"]) == ("model.layers.1.mlp", [2, 3])


def test_a_full_router_is_compared_with_the_parent_whose_gates_are_0(zoo, tmp_path):
    exported = zoo.exported("mixtral")
    manifest = Manifest.load(exported)
    layers = [LayerPlan(block.name, 8, block.top_k, (0, 2, 5), router="full") for block in manifest.blocks]
    plan = PruningPlan(manifest.source_sha256, "manual", tuple(layers))
    optimize(exported, tmp_path / "full", OnnxRuntimeRunner(threads=1), plan=plan)
    code, out, _ = invoke("verify", tmp_path / "full", "--reference", exported)
    assert code == 0
    assert "  model.layers.0.mlp: 0 of 35 tokens flip, 0 without excuse, agreement 1.0000, gates differ by " in out
    rows = tuple(dataclasses.replace(layer, router="rows") for layer in layers)
    dataclasses.replace(plan, layers=rows).save(tmp_path / "rows.json")
    assert invoke("verify", tmp_path / "full", "--reference", exported, "--plan", tmp_path / "rows.json")[0] == 3


def test_the_graph_of_a_model_directory_is_that_directory(model, tmp_path):
    """Its manifest says more than the file: which numbers it is judged by, and who it is."""
    manifest = Manifest.load(model)
    (model / "manifest.json").unlink()
    dataclasses.replace(manifest, details={"activations": {}, "precision": {"experts": "int8"}}).save(model)
    report = json.loads(invoke("verify", model / "model.onnx", "--reference", model, "--json")[1])
    assert (report["candidate_sha256"], report["precision"]) == (sha256_file(model / "manifest.json"), "int8")


def test_an_export_and_a_foreign_graph_are_observed_on_the_fly(zoo, tmp_path):
    """Neither has an observed.onnx; batched_mm keeps its weights in a column."""
    exported = zoo.exported("mixtral")
    foreign = tmp_path / "foreign.onnx"
    onnx.save(onnx.load(zoo.batched_mm("mixtral")), foreign, save_as_external_data=True, location="weights")
    code, out, err = invoke("verify", exported, "--reference", foreign, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    identity = onnx_sha256(foreign, ["weights"])  # as `optimize` calls what it was made from
    known = sha256_file(exported / "manifest.json"), identity
    assert (report["candidate_sha256"], report["reference_sha256"]) == known


def test_the_candidate_is_computed_on_the_provider_that_is_named(model, tmp_path):
    verified = ("verify", tiny.write(tmp_path / "copy"), "--reference", model)
    code, out, _ = invoke(*verified, "--provider", "cpu", "--threads", 1, "--parallel", 2, "--no-spinning")
    assert (code, out.splitlines()[-1]) == (0, "  note: the candidate was computed by cpu")
    assert invoke(*verified, "--provider", "gpu")[2].startswith("error: 'gpu' is no execution provider\n")


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_ep_openvino") is None, reason="needs onnxruntime-ep-openvino")
def test_openvino_passes_with_the_numbers_of_the_graph_and_fails_with_its_own(zoo, tmp_path):
    exported = zoo.exported("vmoe")
    optimize(exported, tmp_path / "dense", OnnxRuntimeRunner(threads=1), form="dense")
    verified = ("verify", tmp_path / "dense", "--reference", exported, "--provider", "openvino")
    assert invoke(*verified)[0] == 0
    own = 'load_config={"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}'
    code, _, err = invoke(*verified, "--provider-option", own, "--no-bisect")
    assert (code, "differs by" in err) == (3, True)
