"""Engines are really built, with TensorRT-RTX and without a GPU. None is run: that needs one."""

import dataclasses
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest

from moe_spec.errors import UserError
from moe_spec.files import sha256_file
from moe_spec.manifest import Manifest, TensorSpec, list_files
from runtime.backend import BuildOptions
from runtime.backends import BACKENDS, open_session
from runtime.build import build
from runtime.engine import check_engine, rebuild
from runtime.profiles import ShapeRange, default_profile
from runtime.targets import find_target
from runtime.tensorrt.driver import Driver, compute_capability_here
from runtime.tensorrt.failures import build_error
from runtime.tensorrt.network import configure, keep_timings, write_plan
from runtime.tensorrt.plan_header import plan_capabilities
from runtime.tensorrt.process import build_in_fresh_process
from runtime.tensorrt.request import BuildRequest
from tests.runtime import tiny

trt = pytest.importorskip("tensorrt_rtx")

ADA = find_target("rtx-ada")
INPUTS = (TensorSpec("x", "float32", ("batch", "sequence", tiny.HIDDEN)),)
without_gpu = pytest.mark.skipif(compute_capability_here() is not None, reason="there is a GPU here")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model", tiny.Tiny(keep=(0, 2, 3)), tiny.plan((0, 2, 3)))


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    engine = tmp_path_factory.mktemp("tiny") / "engine"
    build(model, ADA, BuildOptions(), engine)
    return engine


@pytest.fixture
def engine(built, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "engine"))


def rewrite(model, directory, edit):
    """``model`` with another graph, as whoever made it would have left it."""
    shutil.copytree(model, directory)
    graph = onnx.load(directory / "model.onnx", load_external_data=False)
    edit(graph.graph)
    onnx.save(graph, directory / "model.onnx")
    manifest = Manifest.load(directory)
    (directory / "manifest.json").unlink()
    dataclasses.replace(manifest, files=list_files(directory)).save(directory)
    return directory


@pytest.mark.parametrize(
    ("target", "capability"), [("rtx-ampere", "8.6"), ("sm89", "8.9"), ("rtx-blackwell", "12.0"), ("sm80", "8.0")]
)
def test_an_engine_is_built_for_the_capability_asked_for_and_no_other(model, tmp_path, target, capability):
    """Models of all kinds in all precisions: tests/test_engines.py."""
    manifest = build(model, find_target(target), BuildOptions(), tmp_path / "engine")
    assert plan_capabilities(tmp_path / "engine" / "model.engine") == [capability]
    assert manifest.details["compute_capabilities"] == [capability]
    manifest.check_files(tmp_path / "engine")


def test_the_manifest_says_all_that_cannot_be_asked_without_a_gpu(model, built):
    manifest, parent = Manifest.load(built), Manifest.load(model)
    assert manifest.kind == "engine"
    assert manifest.parent_sha256 == sha256_file(model / "manifest.json")
    assert (manifest.source_sha256, manifest.plan) == (parent.source_sha256, tiny.plan((0, 2, 3)))
    assert (manifest.inputs, manifest.outputs) == (parent.inputs, parent.outputs)
    assert [(block.keep, block.gates) for block in manifest.blocks] == [((0, 2, 3), None)] * 2
    assert [entry.name for entry in manifest.files] == ["build.log", "config.json", "model.engine"]
    assert manifest.tools["tensorrt_rtx"] == trt.__version__
    assert manifest.details["layers"]["TOPK float32"] == 2
    assert manifest.details["number_formats"] == ["float32"]
    assert manifest.details["profiles"] == [{"x": {"min": [1, 1, 8], "opt": [8, 32, 8], "max": [64, 128, 8]}}]
    assert manifest.details["formats"]["float32"] == sum(
        count for layer, count in manifest.details["layers"].items() if layer.endswith(" float32")
    )
    assert manifest.details["memory"]["activations"] > 0
    assert "[INFO]" in (built / "build.log").read_text()


def test_the_same_model_gives_the_same_bytes(model, built, tmp_path):
    build(model, ADA, BuildOptions(), tmp_path / "again")
    assert sha256_file(tmp_path / "again" / "model.engine") == sha256_file(built / "model.engine")


def test_options_reach_the_manifest(model, tmp_path):
    profile = {"x": ShapeRange((1, 4, 8), (2, 4, 8), (3, 4, 8))}
    options = BuildOptions((profile,), workspace_bytes=1 << 30, optimization_level=0)
    details = build(model, ADA, options, tmp_path / "engine").details
    assert details["profiles"] == [{"x": {"min": [1, 4, 8], "opt": [2, 4, 8], "max": [3, 4, 8]}}]
    assert (details["workspace_bytes"], details["optimization_level"]) == (1 << 30, 0)


def test_a_profile_that_does_not_fit_is_refused_before_any_work(model, tmp_path):
    profile = {"y": ShapeRange((1,), (1,), (1,))}
    with pytest.raises(UserError, match="the profile names y, but the model's inputs are x"):
        build(model, ADA, BuildOptions((profile,)), tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_the_parser_names_the_node_that_it_cannot_take_and_the_log_is_kept(model, tmp_path):
    def hide_a_custom_operator(graph):
        (node,) = (node for node in graph.node if node.output[0] == "active_1")
        node.op_type, node.domain, node.name = "Experts", "moe_edge", "/blocks.1/moe/Experts"

    broken = rewrite(model, tmp_path / "model", hide_a_custom_operator)
    log = tmp_path / "engine.build.log"
    message = (
        "tensorrt-rtx cannot take model.onnx: node '/blocks.1/moe/Experts' (Experts): it knows no such operator\n"
        "hint: write the experts in a form that rtx-ada takes (dense, gather, ffn): moe-edge optimize MODEL -o OUT "
        "--target rtx-ada; "
        f"TensorRT's log is {log}"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build(broken, ADA, BuildOptions(), tmp_path / "engine")
    assert "/blocks.1/moe/Experts" in log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.build.log", "model"]


def test_the_builder_says_why_it_cannot_compile(model, tmp_path):
    turing = dataclasses.replace(ADA, compute_capability="7.5")
    with pytest.raises(
        UserError,
        match=re.escape("cannot build model.onnx for compute capability 7.5: Myelin (")
        + ".*"
        + re.escape("for Turing (SM75): FP32 GEMM is not supported."),
    ):
        build(model, turing, BuildOptions(), tmp_path / "engine")


def test_a_capability_that_the_library_lacks_is_refused(model, tmp_path):
    hopper = dataclasses.replace(ADA, compute_capability="9.0")
    message = (
        f"tensorrt-rtx {trt.__version__} knows no ComputeCapability SM90\n"
        f"hint: update tensorrt-rtx, or choose another; TensorRT's log is {tmp_path}/engine.build.log"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build(model, hopper, BuildOptions(), tmp_path / "engine")


def test_one_engine_runs_on_several_targets_and_has_several_profiles(model, tmp_path):
    tokens, prompts = ({"x": ShapeRange((1, low, 8), (1, low, 8), (4, high, 8))} for low, high in ((1, 1), (2, 64)))
    options = BuildOptions((tokens, prompts), also=(find_target("rtx-blackwell"),), weight_streaming=True)
    manifest = build(model, ADA, options, tmp_path / "engine")
    assert plan_capabilities(tmp_path / "engine" / "model.engine") == ["8.9", "12.0"]
    assert manifest.details["compute_capabilities"] == ["8.9", "12.0"]
    assert [profile["x"]["max"] for profile in manifest.details["profiles"]] == [[4, 1, 8], [4, 64, 8]]
    assert rebuild(manifest) == (
        "build it again: moe-edge build MODEL_DIRECTORY -o ENGINE_DIRECTORY --target rtx-ada "
        "--minShapes=x:1x1x8 --optShapes=x:1x1x8 --maxShapes=x:4x1x8 "
        "--minShapes=x:1x2x8 --optShapes=x:1x2x8 --maxShapes=x:4x64x8 --also rtx-blackwell --weight-streaming"
    )


def test_a_build_tells_its_phases_and_their_steps(model, tmp_path):
    told = []
    build(model, ADA, BuildOptions(), tmp_path / "engine", lambda *step: told.append(step))
    assert all(0 <= done <= total for _, done, total in told)
    engine = [(done, total) for phase, done, total in told if phase == "Building engine"]
    steps = engine[0][1]
    assert (engine[0], told[-1]) == ((0, steps), ("Building engine", steps, steps))
    assert {"hashing files", "Optimizing graph", "Timing tactics"} <= {phase for phase, _, _ in told}
    ended = next(place for place, step in enumerate(told) if step[0] == "Timing graph nodes" and step[1] == step[2])
    assert told[ended + 1][0] == "Timing tactics", "what is around an ended phase goes on"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            BuildOptions(timing_cache=Path("cache"), version_compatible=True),
            "--timing-cache cache --version-compatible",
        ),
        (BuildOptions(hardware_compatibility="ampere+"), "--hardware-compatibility ampere+"),
    ],
)
def test_what_only_tensorrt_has_is_refused_for_tensorrt_rtx(model, tmp_path, options, named):
    message = f"tensorrt-rtx has no {named}\nhint: leave it out, or give another --target"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build(model, ADA, options, tmp_path / "engine")


def test_an_unknown_level_is_answered_with_the_closest(model, tmp_path):
    message = "'ampere' is no level of --hardware-compatibility\nhint: did you mean 'ampere+'? "
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        build(model, ADA, BuildOptions(hardware_compatibility="ampere"), tmp_path / "engine")


def test_a_workspace_that_is_too_small_is_named(model, tmp_path):
    message = (
        "tensorrt-rtx finds no kernel for a layer of model.onnx within the workspace of 1 MiB\n"
        "hint: give more with --workspace, or leave it out; or make --maxShapes smaller; "
        f"TensorRT's log is {tmp_path}/engine.build.log"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build(model, ADA, BuildOptions(workspace_bytes=1 << 20), tmp_path / "engine")


def in_fp8(graph):
    """The last weights behind DequantizeLinear."""
    (head,) = (tensor for tensor in graph.initializer if tensor.name == "head")
    graph.initializer.remove(head)
    weights = onnx.helper.make_tensor("head_q", onnx.TensorProto.FLOAT8E4M3FN, head.dims, [0.5] * 24)
    graph.initializer.extend([weights, onnx.helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [0.1])])
    graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["head_q", "scale"], ["head"]))


def test_a_format_that_the_gpu_lacks_is_refused_before_the_build_and_by_it(model, tmp_path):
    fp8, ampere = rewrite(model, tmp_path / "model", in_fp8), find_target("rtx-ampere")
    with pytest.raises(UserError, match=r"model\.onnx holds float8e4m3fn, rtx-ampere takes bfloat16, float16, float32"):
        build(fp8, ampere, BuildOptions(), tmp_path / "engine")
    unaware = dataclasses.replace(ampere, precisions=ADA.precisions)
    message = (
        "model.onnx holds fp8_e4m3, which sm86 cannot compute with\n"
        "hint: build for rtx-ada, rtx-blackwell, dgx-spark; or export without it; "
        f"TensorRT's log is {tmp_path}/engine.build.log"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build(fp8, unaware, BuildOptions(), tmp_path / "engine")
    assert build(fp8, ADA, BuildOptions(), tmp_path / "engine").details["formats"]["float8e4m3fn"] == 1


def test_an_operator_outside_the_experts_is_not_blamed_on_their_form(model, tmp_path):
    def with_det(graph):
        (logits,) = (node for node in graph.node if node.output[0] == "logits")
        logits.output[0] = "before"
        graph.node.append(onnx.helper.make_node("Det", ["x"], ["det"], name="/head/Det"))
        graph.node.append(onnx.helper.make_node("Add", ["before", "det"], ["logits"]))

    message = (
        "tensorrt-rtx cannot take model.onnx: node '/head/Det' (Det): it knows no such operator\nhint: moe-edge "
        "optimize MODEL -o OUT --target rtx-ada rewrites experts (dense, gather, ffn); what is no part of them must be "
        "exported otherwise; "
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        build(rewrite(model, tmp_path / "model", with_det), ADA, BuildOptions(), tmp_path / "engine")


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX:DeprecationWarning")
def test_tensorrts_own_options_reach_its_configuration(tmp_path):
    """With the library that is here: what it would do on a device is TensorRT's."""
    request = BuildRequest(
        "tensorrt", "a100", Path("model.onnx"), Path("model.engine"), ("8.0",), (),
        weight_streaming=True, timing_cache=tmp_path / "timings", version_compatible=True, optimization_level=2,
    )  # fmt: skip
    builder = trt.Builder(trt.Logger())
    config = configure(trt, builder, request)
    keep_timings(config, tmp_path / "timings")
    configure(trt, builder, request)  # and once more, with the file
    assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert config.builder_optimization_level == 2
    assert (tmp_path / "timings").stat().st_size > 0


def test_float32_is_not_computed_in_tf32():
    """TensorRT does by default: what is multiplied has 10 bits of mantissa then."""
    request = BuildRequest("tensorrt-rtx", "rtx-ada", Path("model.onnx"), Path("model.engine"), ("8.9",), ())
    builder = trt.Builder(trt.Logger())
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    assert not configure(trt, builder, request).get_flag(trt.BuilderFlag.TF32)


def test_out_of_memory_is_told_with_what_a_build_takes(tmp_path):
    request = BuildRequest("tensorrt", "jetson-orin", Path("model.onnx"), Path("model.engine"), ("8.7",), ())
    failure = build_error(request, ["[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"])
    assert failure.what == "tensorrt ran out of memory while it built model.onnx"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the disk that is always full")
def test_a_disk_that_cannot_hold_the_engine_is_an_error_of_the_build(model, tmp_path):
    request = BuildRequest(
        "tensorrt-rtx", "rtx-ada", model / "model.onnx", Path("/dev/full"), ("8.9",), (default_profile(INPUTS),)
    )
    with pytest.raises(OSError, match="No space left on device"):  # what it is told as: tests/cli/test_full_disk.py
        build_in_fresh_process(request, tmp_path / "build.log")


def test_of_two_builds_into_one_directory_one_is_refused(model, tmp_path):
    with ThreadPoolExecutor(2) as both:
        builds = [both.submit(build, model, ADA, BuildOptions(), tmp_path / "engine") for _ in range(2)]
    (failure,) = (str(done.exception()) for done in builds if done.exception() is not None)
    assert failure.startswith(f"{tmp_path}/engine already exists\n")
    Manifest.load(tmp_path / "engine").check_files(tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_an_older_library_gives_the_plan_in_one_piece(model, built, tmp_path):
    """Builder without ``build_serialized_network_to_stream``: TensorRT 10.3."""
    written = tmp_path / "model.engine"

    class Old:
        def build_serialized_network(self, _network, _config):
            return (built / "model.engine").read_bytes()

    with written.open("wb") as file:
        assert write_plan(trt, Old(), None, None, file)
    assert sha256_file(written) == sha256_file(built / "model.engine")


def workers() -> list[int]:
    """Build processes that this process started."""
    tasks = Path("/proc/self/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    return [
        int(child) for child in children if b"runtime.tensorrt.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the build process in /proc")
def test_a_crash_of_tensorrt_is_an_error_and_the_log_is_kept(model, tmp_path):
    def crash() -> None:
        while not (found := workers()):
            time.sleep(0.01)
        os.kill(found[0], signal.SIGSEGV)

    crasher = threading.Thread(target=crash)
    crasher.start()
    with pytest.raises(
        UserError,
        match=r"^tensorrt-rtx ended with signal SIGSEGV while it built model.onnx; it last said: .*\n"
        r"hint: free some memory and try again; if it crashes again, report it to NVIDIA with the log; "
        rf"TensorRT's log is {tmp_path}/engine.build.log$",
    ):
        build(model, ADA, BuildOptions(), tmp_path / "engine")
    crasher.join()
    assert [path.name for path in tmp_path.iterdir()] == ["engine.build.log"]


@without_gpu
def test_an_engine_is_not_opened_without_its_gpu(engine):
    message = (
        f"{engine} is built, but running it needs a GPU of compute capability 8.9 with its NVIDIA driver, and there "
        "is none here\nhint: copy the directory to such a device; here, run or verify the model directory that it was "
        "built from"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        open_session(engine)


REBUILD = (
    "hint: build it again: moe-edge build MODEL_DIRECTORY -o ENGINE_DIRECTORY --target rtx-ada "
    "--minShapes=x:1x1x8 --optShapes=x:8x32x8 --maxShapes=x:64x128x8"
)


def test_an_engine_of_another_version_is_refused_with_the_command_that_rebuilds_it(engine):
    path = engine / "manifest.json"
    path.write_text(path.read_text().replace(trt.__version__, "1.6.0"))
    message = (
        f"{engine} was built with tensorrt_rtx 1.6.0, but {trt.__version__} is installed; engines are not portable\n"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message + REBUILD)}$"):
        open_session(engine)


def test_an_engine_that_was_cut_is_refused(engine):
    path = engine / "model.engine"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    message = f"{path} has {size - 1} bytes, manifest.json says {size}\n"
    with pytest.raises(UserError, match=f"^{re.escape(message + REBUILD)}$"):
        open_session(engine)


def test_an_engine_with_a_flipped_bit_is_refused(engine):
    path = engine / "model.engine"
    plan = bytearray(path.read_bytes())
    plan[len(plan) // 2] ^= 1
    path.write_bytes(plan)
    message = f"{path} is not the file that manifest.json describes (sha256 differs)\n"
    with pytest.raises(UserError, match=f"^{re.escape(message + REBUILD)}$"):
        open_session(engine)


def test_what_is_no_plan_has_no_capabilities(tmp_path):
    (tmp_path / "model.engine").write_bytes(b"0" * 64)
    message = f"{tmp_path}/model.engine is no TensorRT-RTX engine\nhint: build it again with `moe-edge build`"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        plan_capabilities(tmp_path / "model.engine")


@without_gpu
def test_without_a_driver_there_is_no_device():
    with pytest.raises(UserError, match=r"^there is no NVIDIA driver here: .*\nhint: install the driver of the GPU$"):
        Driver()


@without_gpu
def test_tensorrt_for_a_jetson_is_not_built_elsewhere(model):
    (reason,) = BACKENDS["tensorrt"].why_not(model, find_target("jetson-orin"))
    assert re.fullmatch(
        r"tensorrt cannot be imported: .* \(pip install 'moe-edge\[tensorrt\]'\)"
        r"|TensorRT builds jetson-orin on the device itself \(compute capability 8.7\), and there is no GPU here",
        reason,
    )


def test_a_target_of_a_newer_or_another_library_is_not_built(model):
    newer = dataclasses.replace(ADA, versions=">=99")
    assert BACKENDS["tensorrt-rtx"].why_not(model, newer) == [
        f"rtx-ada takes tensorrt-rtx >=99, here is {trt.__version__}"
    ]
    message = f"{model} cannot be built for rtx-ada: a100 is a target of tensorrt, not of tensorrt-rtx\nhint: "
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        build(model, ADA, BuildOptions(also=(find_target("a100"),)), model.parent / "engine")


def test_an_engine_that_is_version_compatible_is_opened_by_newer_versions_of_its_major_and_the_next(engine):
    manifest = Manifest.load(engine)
    made_by = {**manifest.tools, "tensorrt_rtx": "10.3.0"}
    dataclasses.replace(manifest, tools=made_by, details={**manifest.details, "version_compatible": True}).save(engine)
    for version in ("10.3.0", "10.16.1", "11.4.1"):
        assert check_engine(engine, "tensorrt-rtx", "tensorrt_rtx", version).tools == made_by
    for version in ("10.2.0", "12.0.0"):
        with pytest.raises(
            UserError, match=re.escape(f"was built with tensorrt_rtx 10.3.0, but {version} is installed")
        ):
            check_engine(engine, "tensorrt-rtx", "tensorrt_rtx", version)
