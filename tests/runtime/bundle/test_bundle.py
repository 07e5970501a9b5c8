"""A bundle is checked here as on a device: by its own verify.py, with nothing but numpy and ONNX Runtime."""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from benchmarks.planted import plant, swap_experts
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from models.vmoe.assets import fashion_mnist
from moe_spec.dataset import Dataset, load_dataset
from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.manifest import Manifest, TensorSpec
from runtime.backend import BuildOptions
from runtime.build import build
from runtime.bundle.bundle import bundle
from runtime.bundle.golden import Case, golden_cases, save_case
from runtime.bundle.scripts import DEVICE, LIBRARY, PACKAGES, write_scripts
from runtime.profiles import ShapeRange, parse_profiles
from runtime.targets import find_target
from runtime.verification.tolerances import TOLERANCES
from tests.runtime import tiny
from tests.runtime.bundle.on_device import program
from tests.sample_models import SAMPLE_MODELS
from tests.zoo import RUNNER

ORIN, ADA, CPU = map(find_target, ("jetson-orin", "rtx-ada", "onnxruntime-cpu"))
DATA = Dataset({"x": tiny.examples(6)}, None, "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def bundled(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundled") / "bundle"
    bundle(model, ORIN, out, DATA, batch_size=4)
    return out


@pytest.fixture
def mine(bundled, tmp_path):
    return Path(shutil.copytree(bundled, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Run a program of a bundle in a Python that has numpy and ONNX Runtime, and nothing else."""
    packages = tmp_path_factory.mktemp("packages")
    for installed in (Path(np.__file__).parent, Path(onnxruntime.__file__).parent):
        for part in installed.parent.glob(f"{installed.name}*"):
            if part.suffix in ("", ".libs"):
                (packages / part.name).symlink_to(part)

    def run(program, *arguments):
        command = [sys.executable, "-S", str(program), *map(str, arguments)]
        found = subprocess.run(command, env={"PYTHONPATH": str(packages)}, capture_output=True, text=True)
        return found.returncode, found.stdout, found.stderr

    return run


def seal(directory):
    """Make SHA256SUMS anew, as somebody would who means to change a bundle."""
    sums = directory / "SHA256SUMS"
    names = [line[66:] for line in sums.read_text().splitlines()]
    sums.write_text("".join(f"{sha256_file(directory / name)}  {name}\n" for name in names))


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_it_proves_itself_with_numpy_and_onnxruntime_alone(mine, device):
    code, out, err = device(mine / "verify.py", "--backend", "onnxruntime")
    assert (code, err) == (0, "")
    assert out.splitlines()[:3] == [
        "layer blocks.0.moe: 0 of 30 tokens select other experts",
        "layer blocks.1.moe: 0 of 30 tokens select other experts",
        "output logits: differs by 0.0e+00 of its range on 6 examples",
    ]
    assert out.splitlines()[-1] == "PASS"
    report = json.loads((mine / "out" / "report.json").read_text())
    assert report["passed"] is True
    assert set(report["latency_ms"]) == {"p50", "p90", "p99"}
    assert report["backend"] == f"onnxruntime {onnxruntime.__version__}"
    code, _, _ = device(mine / "verify.py", "--backend", "onnxruntime", "--threads", 1)
    assert code == 0  # what it wrote does not count as a change


def test_the_same_inputs_give_the_same_bytes(model, bundled, tmp_path):
    bundle(model, ORIN, tmp_path / "again", DATA, batch_size=4)
    assert contents(tmp_path / "again") == contents(bundled)


def test_a_change_of_any_byte_is_found(bundled, tmp_path, monkeypatch):
    check_files = program(monkeypatch)["check_files"]
    check_files(bundled)
    directory = Path(shutil.copytree(bundled, tmp_path / "bundle"))
    random = np.random.default_rng(0)
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size):
        before = path.read_bytes()
        changed = bytearray(before)
        changed[int(random.integers(len(before)))] ^= 1 << int(random.integers(8))
        path.write_bytes(changed)
        with pytest.raises(UserError):
            check_files(directory)
        path.write_bytes(before)
    check_files(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: (at / "model" / "model.onnx").unlink(), "{at}/model/model.onnx is missing, SHA256SUMS lists it"),
        (lambda at: (at / "note.txt").write_text("mine"), "{at}/note.txt does not belong to the bundle"),
        (lambda at: (at / "SHA256SUMS").unlink(), "{at}/SHA256SUMS is missing"),
        (
            lambda at: (at / "SHA256SUMS").write_bytes((at / "SHA256SUMS").read_bytes() + b"\n"),
            "{at}/SHA256SUMS was changed",
        ),
        (
            lambda at: (at / "thresholds.json").write_text("{}"),
            "{at}/thresholds.json was changed: its sha256 is another than in SHA256SUMS",
        ),
    ],
)
def test_what_was_changed_is_named(mine, device, change, message):
    change(mine)
    code, out, err = device(mine / "verify.py", "--backend", "onnxruntime")
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == f"error: {message.format(at=mine)}"


def test_cuda_is_told_to_compute_float32_in_float32(bundled, monkeypatch):
    told = []

    class Session:
        def __init__(self, _graph, _settings, providers):
            told.append(providers)

        def get_providers(self):
            return ["CUDAExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    options = argparse.Namespace(threads=0, provider=["CUDAExecutionProvider"])
    program(monkeypatch)["OnnxRuntime"](bundled, options)
    assert told == [[("CUDAExecutionProvider", {"use_tf32": "0"})]]


def test_a_scalar_is_that_of_all_examples(monkeypatch):
    output = program(monkeypatch)["Output"]("aux_loss", {"element": 0.1})
    seen, not_tied = np.array([True, True]), np.array([False, False])
    output.add(np.array(2.0), np.array(3.0), seen, not_tied)
    output.add(np.array(4.0), np.array(0.0), np.array([True, False]), not_tied)
    assert output.report() == {"name": "aux_loss", "examples": 1, "excused": 0, "max_rel": 0.5}


def test_a_graph_of_bfloat16_is_refused_before_inputs_are_drawn_which_numpy_cannot(tmp_path, monkeypatch):
    text = """<ir_version: 10, opset_import: ["" : 20]>
        half (bfloat16[batch, 4] x) => (bfloat16[batch, 4] y) { y = Identity(x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "observed.onnx")
    manifest = Manifest("optimized", "", "", (), (TensorSpec("x", "bfloat16", ("batch", 4)),), ())
    monkeypatch.setattr("runtime.bundle.golden.batches_of", None)
    with pytest.raises(
        UserError, match=r"^x of \S+/observed\.onnx is bfloat16, which numpy lacks\nhint: ONNX Runtime has "
    ):
        golden_cases(tmp_path, manifest, None, 1, ())


def test_a_router_that_chooses_wrongly_is_a_fault(mine, device, tmp_path):
    wrong = tiny.write(tmp_path / "wrong", tiny.Tiny(rolled=1))
    for name in ("model.onnx.data", "model.onnx", "observed.onnx"):
        shutil.copyfile(wrong / name, mine / "model" / name)
    seal(mine)
    code, out, _ = device(mine / "verify.py", "--backend", "onnxruntime")
    assert code == 3
    assert re.search(
        r"^layer blocks.1.moe: \d+ tokens select other experts although the choice was clear$", out, re.MULTILINE
    )
    assert out.splitlines()[-1] == "FAIL"
    assert json.loads((mine / "out" / "report.json").read_text())["passed"] is False


def test_twins_may_flip(model, device, tmp_path):
    """Experts that score almost the same are chosen by rounding: no fault, and the rest is compared."""
    twins = tiny.write(tmp_path / "twins", tiny.Tiny(twins=True))
    bundle(twins, CPU, tmp_path / "bundle", DATA, precision="float16")
    code, _, _ = device(tmp_path / "bundle" / "verify.py", "--backend", "onnxruntime")
    assert code == 0


@pytest.mark.parametrize("precision", [Precision("int8"), Precision("int4", block_size=32)], ids=lambda it: it.experts)
def test_quantised_experts_are_judged_as_verify_judges_them(zoo, device, tmp_path, precision):
    """By the tolerances of their format; two experts that changed places are a fault nevertheless."""
    exported = SAMPLE_MODELS["pruned"].make(zoo)
    right, wrong, out = tmp_path / "right", tmp_path / "wrong", tmp_path / "bundle"
    swapped = plant(exported, tmp_path / "swapped", swap_experts, 1).parent
    for source, model in ((exported, right), (swapped, wrong)):
        optimize(source, model, RUNNER, form="dense", precision=precision, prove=False)
    images = load_dataset(fashion_mnist() / "test.npz", fashion_mnist())
    bundle(right, CPU, out, images)
    judged = {"precision": precision.experts, **vars(TOLERANCES[precision.experts])}
    assert json.loads((out / "thresholds.json").read_text()) == judged
    code, said, _ = device(out / "verify.py", "--backend", "onnxruntime")
    assert (code, said.splitlines()[-1]) == (0, "PASS")
    for path in (out / "model").glob("*.onnx*"):
        shutil.copyfile(wrong / path.name, path)
    seal(out)
    code, said, _ = device(out / "verify.py", "--backend", "onnxruntime")
    assert (code, said.splitlines()[-1]) == (3, "FAIL")


def test_an_engine_that_was_not_built_is_asked_for(mine, device):
    code, _, err = device(mine / "verify.py", "--backend", "tensorrt")
    assert code == 1
    assert err.startswith("error: No module named 'tensorrt'")


# --- what is built on the device --------------------------------------------------------------------------------------


TRTEXEC = """#!/bin/sh
echo "$@" >> "$LOG"
case "$1" in --help) echo "$KNOWN";; esac
for option in "$@"; do case "$option" in --saveEngine=*) touch "${option#--saveEngine=}";; esac; done
"""


def trtexec_calls(bundle, known, *options):
    """Run build.sh over a stand-in that writes down how it is called: trtexec cannot be installed here."""
    trtexec, log = bundle.parent / "trtexec", bundle.parent / "log"
    trtexec.write_text(TRTEXEC)
    trtexec.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "TRTEXEC": str(trtexec), "LOG": str(log), "KNOWN": known}
    subprocess.run([bundle / "build.sh", *options], env=environment, check=True, capture_output=True)
    return log.read_text().splitlines()[1:]  # without --help


@pytest.mark.parametrize(("known", "typed", "compared"), [("--stronglyTyped", True, 0), ("--loadRefOutputs", False, 2)])
def test_build_sh_calls_trtexec_of_either_kind(mine, known, typed, compared):
    engine, observed, *checks = trtexec_calls(mine, known, "--memPoolSize=workspace:64")
    options = (
        "--noTF32 --skipInference --timingCacheFile=out/timing.cache "
        "--minShapes=x:1x1x8 --optShapes=x:8x32x8 --maxShapes=x:64x128x8 "
        + "--stronglyTyped " * typed
        + "--memPoolSize=workspace:64"
    )
    assert engine == f"--onnx=model/model.onnx --saveEngine=out/engine.plan.part {options}"
    assert observed == f"--onnx=model/observed.onnx --saveEngine=out/observed.plan.part {options}"
    assert len(checks) == compared
    for number, line in enumerate(checks):
        assert f"--loadInputs=x:golden/{number}/x.bin --loadRefOutputs=logits:golden/{number}/logits.bin" in line
    assert {path.name for path in (mine / "out").iterdir()} == {"engine.plan", "observed.plan"}


def test_trtexec_compares_each_case_in_the_profile_that_takes_it(model, tmp_path):
    profiles = parse_profiles(["x:1x1x8", "x:4x1x8"], ["x:1x5x8", "x:4x5x8"], ["x:3x5x8", "x:8x5x8"])
    bundle(model, ORIN, tmp_path / "bundle", DATA, batch_size=4, profiles=profiles)
    built, _, four, two = trtexec_calls(tmp_path / "bundle", "--loadRefOutputs")
    assert "--profile=0 --minShapes=x:1x1x8" in built
    assert "--profile=1 --minShapes=x:4x1x8" in built
    assert ("--shapes=x:4x5x8" in four, "--useProfile=1" in four) == (True, True)
    assert ("--shapes=x:2x5x8" in two, "--useProfile" in two) == (True, False)


def test_an_input_with_the_name_of_a_placeholder_runs_no_command(tmp_path):
    name = "@CASES@$(touch ran)"
    spec, array = TensorSpec(name, "float32", ("batch",)), {"file": "golden/0/x.bin", "shape": [1]}
    details = {
        "precision": "float32",
        "package": "tensorrt",
        "versions": ORIN.versions,
        "profiles": [{name: {"min": [1], "opt": [1], "max": [1]}}],
        "golden": [{"inputs": {name: array}, "outputs": {name: array}, "magnitude": 1.0, "profile": 0}],
    }
    (tmp_path / "bundle").mkdir()
    write_scripts(tmp_path / "bundle", ORIN, Manifest("optimized", "", "", (), (spec,), (spec,)), details)
    built, check = trtexec_calls(tmp_path / "bundle", "--loadRefOutputs")
    assert f"--minShapes={name}:1 --optShapes={name}:1 --maxShapes={name}:1" in built
    assert f"--shapes={name}:1 --loadInputs={name}:golden/0/x.bin" in check
    assert not (tmp_path / "bundle" / "ran").exists()


def test_raw_files_are_what_the_archives_hold(bundled):
    for case in Manifest.load(bundled).details["golden"]:
        with np.load(bundled / case["npz"]) as arrays:
            for name, entry in (case["inputs"] | case["outputs"]).items():
                assert (bundled / entry["file"]).read_bytes() == arrays[name].tobytes()
                assert list(arrays[name].shape) == entry["shape"]


def test_a_golden_case_holds_arrays_of_any_name(tmp_path):
    case = Case(2, {"file": np.arange(2)}, {"allow_pickle": np.arange(3)}, profile=0)
    save_case(0, case, (TensorSpec("allow_pickle", "int64", ("n",)),), tmp_path)
    with np.load(tmp_path / "golden" / "0.npz") as saved:
        assert {name: saved[name].tolist() for name in saved} == {"file": [0, 1], "allow_pickle": [0, 1, 2]}


def test_build_py_builds_for_a_gpu_that_is_elsewhere(model, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    bundle(model, ADA, tmp_path / "bundle", DATA)
    assert not (tmp_path / "bundle" / "build.sh").exists()
    command = [sys.executable, tmp_path / "bundle" / "build.py", "--workspace", "64"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    plans = [tmp_path / "bundle" / "out" / name for name in ("engine.plan", "observed.plan")]
    sizes = [plan.stat().st_size for plan in plans]
    assert found.stdout.splitlines() == [
        f"{plan}: {size:,} bytes, tensorrt_rtx {trt.__version__}" for plan, size in zip(plans, sizes, strict=True)
    ]
    assert sizes[1] > sizes[0] > 10_000


def test_build_py_names_the_package_that_is_missing(mine, device):
    code, _, err = device(mine / "build.py")
    assert (code, err.splitlines()[1]) == (1, f"hint: install tensorrt {ORIN.versions}")


# --- what travels -----------------------------------------------------------------------------------------------------


def test_what_travels_runs_on_python_3_8():
    """As vermin reads it; JetPack 5 has no newer Python."""
    files = [*DEVICE.glob("*.py"), *(PACKAGES / name for name in LIBRARY)]
    vermin = Path(str(sysconfig.get_path("scripts"))) / "vermin"
    found = subprocess.run(
        [vermin, "--target=3.8-", "--no-tips", "--violations", *files], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


def test_what_travels_needs_nothing_that_stays():
    there = {name.removesuffix(".py").replace("/", ".") for name in LIBRARY}
    for path in [*DEVICE.glob("*.py"), *(PACKAGES / name for name in LIBRARY)]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in sys.stdlib_module_names | {"numpy"} or name in there


def test_the_readme_says_how(bundled):
    text = (bundled / "README.md").read_text()
    assert "@" not in text
    assert "| blocks.0.moe | 4 | 2 | dense |" in text
    assert "./build.sh\npython3 verify.py --backend tensorrt" in text
    assert "`out/observed.plan` shows what its routers do" in text


def test_a_model_without_routers_has_one_engine(tmp_path):
    model = tiny.write(tmp_path / "model", tiny.Tiny(keep=(1,)))
    bundle(model, ORIN, tmp_path / "bundle", DATA)
    assert len(trtexec_calls(tmp_path / "bundle", "--stronglyTyped")) == 1
    assert "observed.plan" not in (tmp_path / "bundle" / "README.md").read_text()


# --- refusals ---------------------------------------------------------------------------------------------------------


def refuses(message, model, target, out, *arguments, **options):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        bundle(model, target, out, *arguments, **options)
    assert not out.exists()


def test_a_form_that_the_target_does_not_take_is_refused(tmp_path):
    sorted_model = tiny.write(tmp_path / "model")
    manifest = sorted_model / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"dense"', '"sorted"'))
    refuses(
        f"jetson-orin does not take {sorted_model}: "
        + "; ".join(f"layer {name} has the form 'sorted', jetson-orin takes dense, gather, ffn" for name in tiny.LAYERS)
        + f"\nhint: moe-edge optimize {sorted_model} -o DIRECTORY --target jetson-orin",
        sorted_model,
        ORIN,
        tmp_path / "out",
    )


def test_a_provider_of_onnx_runtime_is_named_where_verify_can_load_it(model, tmp_path):
    bundle(model, find_target("onnxruntime-cuda"), tmp_path / "cuda")
    readme = (tmp_path / "cuda" / "README.md").read_text()
    assert "On cuda:\n\n```\npython3 verify.py --backend onnxruntime --provider CUDAExecutionProvider\n```" in readme
    refuses(
        "onnxruntime-openvino is reached by a plugin of ONNX Runtime, which verify.py of a bundle does not load\n"
        "hint: take the model directory there: moe-edge verify --provider openvino",
        model,
        find_target("onnxruntime-openvino"),
        tmp_path / "out",
    )


def test_bundles_and_engines_are_no_models(model, bundled, tmp_path):
    build(model, CPU, BuildOptions(), tmp_path / "engine")
    for directory, kind in ((tmp_path / "engine", "engine"), (bundled, "bundle")):
        refuses(
            f"{directory} holds the kind {kind!r}, expected a model directory\n"
            "hint: give the model directory that it was made from",
            directory,
            CPU,
            tmp_path / "out",
        )


def test_examples_that_no_profile_takes_are_refused(model, tmp_path):
    refuses(
        "no golden inputs fit the profile --minShapes=x:2x9x8 --optShapes=x:2x9x8 --maxShapes=x:2x9x8\n"
        "hint: give examples that fit it with --data and --batch-size, or a wider profile",
        model,
        ORIN,
        tmp_path / "out",
        profiles=parse_profiles([], ["x:2x9x8"], []),
    )


def test_data_of_another_model_is_refused_by_its_name(model, tmp_path):
    refuses(
        "test.npz: inputs are y, expected x\nhint: name the arrays like the model's inputs",
        model,
        ORIN,
        tmp_path / "out",
        Dataset({"y": tiny.examples(6)}, None, "", "test.npz"),
    )


def test_profiles_are_for_engines(model, tmp_path):
    profiles = ({"x": ShapeRange((1, 1, 8), (1, 1, 8), (1, 1, 8))},)
    refuses(
        "ONNX Runtime takes any shape and no profile\nhint: leave out --optShapes and its like",
        model,
        CPU,
        tmp_path / "out",
        profiles=profiles,
    )


def test_random_feeds_are_golden_where_there_is_no_data(model, tmp_path):
    made = bundle(model, CPU, tmp_path / "out")
    assert [case["examples"] for case in made.details["golden"]] == [1, 2, 5]
