"""What was asked for is what is used, or an error that says what to do."""

import collections
import importlib.util
import logging
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from moe_spec.errors import UserError
from runtime.backend import BuildOptions
from runtime.backends import open_session
from runtime.build import build
from runtime.execution import Execution, parse_options
from runtime.onnxruntime.library import check_placement, session_options, version
from runtime.providers import PROVIDERS, find_provider
from runtime.targets import find_target
from runtime.tensorrt.driver import compute_capability_here
from tests.runtime import tiny
from tests.runtime.tiny import Tiny

WHEEL = f"onnxruntime-gpu {version()}, which is installed,"
HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
WITHOUT_GPU = pytest.mark.skipif(
    compute_capability_here() is not None or not HAS_CUDA, reason="this is about onnxruntime-gpu without a GPU"
)
OPENVINO = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_ep_openvino") is None, reason="needs pip install onnxruntime-ep-openvino"
)


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def refusal(path, execution):
    with pytest.raises(UserError) as caught:
        open_session(path, 1, execution)
    return str(caught.value)


@pytest.mark.parametrize("row", PROVIDERS, ids=lambda row: row.name)
def test_a_row_is_found_by_both_names_and_is_given_its_own_options_only(row):
    assert find_provider(row.name) == find_provider(row.official) == row
    assert row.defaults(2, Path("cache")).keys() <= set(row.options)
    assert len(set(row.options)) == len(row.options)


def test_names_are_unique():
    for names in ([row.name for row in PROVIDERS], [row.official for row in PROVIDERS]):
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Execution("cudda"),
            "'cudda' is no execution provider\n"
            "hint: did you mean 'cuda'? known: coreml, cpu, cuda, directml, openvino, qnn, tensorrt, tensorrt-rtx",
        ),
        (
            lambda: Execution("directml", {"device": "0"}),
            "'device' is no option of the provider directml\nhint: did you mean 'device_id'? known: device_id",
        ),
        (lambda: Execution(parallel=0), "0 operators may run at once, expected 1 or more\nhint: give 1 or more"),
        (
            lambda: parse_options(["device_id"]),
            "the provider option 'device_id' has no value\nhint: give each once, as NAME=VALUE",
        ),
        (
            lambda: parse_options(["device_id=0", "device_id=1"]),
            "the provider option 'device_id=1' comes twice\nhint: give each once, as NAME=VALUE",
        ),
        (
            lambda: Execution("qnn").settled(1, Path("cache")),
            "the provider qnn keeps nothing, so --cache says nothing\nhint: leave --cache out",
        ),
        (
            lambda: Execution("openvino", {"load_config": "{}"}).settled(1, Path("cache")),
            "the provider openvino has the option load_config for it, so --cache says nothing\nhint: leave --cache out",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make()


def test_options_that_were_given_win():
    assert Execution("cuda").settled(1).options == {"use_tf32": "0"}
    assert Execution("cuda", {"use_tf32": "1", "device_id": "1"}).settled(1).options == {
        "use_tf32": "1",
        "device_id": "1",
    }


def test_a_provider_keeps_to_the_formats_of_the_graph():
    assert Execution("qnn").settled(1).options == {"enable_htp_fp16_precision": "0"}
    assert Execution("coreml").settled(1, Path("cache")).options == {
        "ModelFormat": "MLProgram",
        "ModelCacheDirectory": "cache",
    }
    assert Execution("coreml", {"ModelFormat": "NeuralNetwork"}).settled(1).options == {"ModelFormat": "NeuralNetwork"}


@WITHOUT_GPU
@pytest.mark.parametrize(
    ("name", "library", "needs"),
    [
        ("cuda", "libcublasLt.so.13", "an NVIDIA GPU with its driver, CUDA, cuDNN: pip install {gpu}"),
        (
            "tensorrt",
            "libcublas.so.13",
            "an NVIDIA GPU with its driver, CUDA, cuDNN, TensorRT: pip install {gpu} tensorrt",
        ),
    ],
)
def test_a_provider_that_is_there_and_cannot_start_says_what_it_misses(name, library, needs, model, capfd):
    message = (
        f"ONNX Runtime cannot start {name}: {library}: cannot open shared object file: No such file or directory\n"
        f"hint: it needs {needs.format(gpu=chr(39) + 'onnxruntime-gpu[cuda,cudnn]' + chr(39))}; "
        "or run on the CPU: --provider cpu"
    )
    assert refusal(model, Execution(name)) == message
    assert capfd.readouterr() == ("", "")  # ONNX Runtime prints a page of its own


@pytest.mark.skipif(onnxruntime.get_device() != "GPU", reason="another wheel of ONNX Runtime is installed")
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (
            "directml",
            "it is in onnxruntime-directml on Windows only; `moe-edge doctor` says which providers work here",
        ),
        (
            "tensorrt-rtx",
            "pip install onnxruntime-ep-nv-tensorrt-rtx, which goes beside onnxruntime-gpu; it needs an RTX GPU with "
            "its driver",
        ),
    ],
)
def test_a_provider_that_is_not_there_says_what_brings_it(name, hint, model):
    assert refusal(model, Execution(name)) == f"{WHEEL} has no provider {name}\nhint: {hint}"


def test_nodes_that_fall_to_the_cpu_are_refused_or_told(caplog):
    placed = {
        "openvino": collections.Counter({"MatMul": 3}),
        "cpu": collections.Counter({"TopK": 2, "NonZero": 1}),
    }
    what = "3 of 6 nodes of a.onnx run on the CPU, not on openvino: NonZero 1, TopK 2"
    openvino = find_provider("openvino")
    with pytest.raises(UserError) as caught:
        check_placement(Path("a.onnx"), openvino, placed, cpu_fallback=False)
    assert str(caught.value) == (
        f"{what}\nhint: write another form: moe-edge optimize --form dense; or let run, bench or verify leave them "
        "there: --cpu-fallback"
    )
    assert caplog.messages == []
    check_placement(Path("a.onnx"), openvino, placed, cpu_fallback=True)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, what)]
    check_placement(Path("a.onnx"), openvino, {"openvino": placed["cpu"]}, cpu_fallback=False)


def test_what_computes_sizes_may_stay_on_the_cpu_where_onnx_runtime_wants_it_there(caplog):
    """Stand-in for what a session on CUDA reports; none ran here."""
    sizes = collections.Counter({"Gather": 2, "Concat": 1})
    placed = {"cuda": collections.Counter({"MatMul": 3, "Shape": 1}), "cpu": sizes}
    check_placement(Path("a.onnx"), find_provider("cuda"), placed, cpu_fallback=False)
    placed["cpu"] = sizes + collections.Counter({"TopK": 1})
    with pytest.raises(UserError) as caught:
        check_placement(Path("a.onnx"), find_provider("cuda"), placed, cpu_fallback=False)
    assert caught.value.what == "1 of 8 nodes of a.onnx run on the CPU, not on cuda: TopK 1"
    with pytest.raises(UserError) as caught:  # which may lack a kernel for Gather, so that weights are gathered there
        check_placement(Path("a.onnx"), find_provider("openvino"), {"cpu": sizes}, cpu_fallback=False)
    assert caught.value.what == "3 of 3 nodes of a.onnx run on the CPU, not on openvino: Concat 1, Gather 2"
    assert caplog.messages == []


def test_a_plugin_that_cannot_be_imported_says_why(model, monkeypatch, tmp_path):
    (tmp_path / "onnxruntime_qnn.py").write_text("raise ValueError('numpy.dtype size changed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime_qnn", raising=False)
    assert refusal(model, Execution("qnn")).partition("\n")[0] == (
        "ONNX Runtime cannot start qnn: onnxruntime_qnn cannot be imported: numpy.dtype size changed"
    )


def test_the_cpu_runs_everything_by_both_of_its_names(model, caplog):
    for name in (None, "cpu", "CPUExecutionProvider"):
        with open_session(model, 1, Execution(name)) as session:
            assert session.run({"x": tiny.examples(2)})["logits"].shape == (2, 3)
    assert caplog.messages == []


@pytest.mark.parametrize("execution", [Execution(parallel=2), Execution(spinning=False)])
def test_threads_change_no_number(execution, model):
    feeds = {"x": tiny.examples(6)}
    with open_session(model, 1) as plain, open_session(model, 2, execution) as other:
        np.testing.assert_array_equal(plain.run(feeds)["logits"], other.run(feeds)["logits"])


def test_threads_are_told_to_onnx_runtime():
    plain, told = session_options(3, Execution()), session_options(0, Execution(parallel=2, spinning=False))
    modes = onnxruntime.ExecutionMode
    spins = [options.get_session_config_entry("session.intra_op.allow_spinning") for options in (plain, told)]
    assert (plain.intra_op_num_threads, plain.execution_mode, spins[0]) == (3, modes.ORT_SEQUENTIAL, "1")
    assert (told.inter_op_num_threads, told.execution_mode, spins[1]) == (2, modes.ORT_PARALLEL, "0")


def test_an_engine_runs_on_what_it_was_built_for(model, tmp_path):
    engine = tmp_path / "engine"
    build(model, find_target("cpu"), BuildOptions(), engine)
    with open_session(engine, 1, Execution("cpu")) as session:
        assert session.run({"x": tiny.examples(2)})["logits"].shape == (2, 3)
    rebuild = "build it again: moe-edge build MODEL_DIRECTORY -o ENGINE_DIRECTORY --target onnxruntime-cpu"
    assert refusal(engine, Execution("cuda")) == f"{engine} was built for cpu, asked for cuda\nhint: {rebuild}"
    assert refusal(engine, Execution(cache=tmp_path / "cache")) == (
        f"{engine} is an engine, of which a cache keeps nothing\nhint: leave --cache out, or give the model"
    )


def test_an_engine_of_tensorrt_has_no_provider(model, tmp_path):
    engine = tmp_path / "engine"
    build(model, find_target("cpu"), BuildOptions(), engine)
    text = (engine / "manifest.json").read_text()
    (engine / "manifest.json").write_text(text.replace('"backend": "onnxruntime"', '"backend": "tensorrt-rtx"'))
    assert refusal(engine, Execution("cpu")) == (
        f"{engine} is an engine of tensorrt-rtx, which ONNX Runtime does not run\n"
        "hint: leave out --provider and what goes with it, or give the model that it was built from"
    )


@WITHOUT_GPU
def test_an_engine_for_a_provider_that_does_not_start_is_refused_before_any_work(model, tmp_path):
    with pytest.raises(UserError) as caught:
        build(model, find_target("onnxruntime-cuda"), BuildOptions(), tmp_path / "engine")
    assert caught.value.what == (
        f"{model} cannot be built for onnxruntime-cuda: ONNX Runtime cannot start cuda: libcublasLt.so.13: cannot open "
        "shared object file: No such file or directory"
    )


def test_nothing_is_built_ahead_for_a_provider_that_compiles(model, tmp_path):
    with pytest.raises(UserError) as caught:
        build(model, find_target("onnxruntime-openvino"), BuildOptions(), tmp_path / "engine")
    assert caught.value.what == (
        f"{model} cannot be built for onnxruntime-openvino: openvino compiles a graph when it is opened, so nothing is "
        "done ahead: give the model itself to run --provider openvino, and --cache to keep what it made of it"
    )


@OPENVINO
def test_openvino_computes_what_the_cpu_computes(tmp_path):
    """In float32, as the graph says: by default it computes in bfloat16 where the CPU has that."""
    model, feeds = tiny.write(tmp_path / "model", Tiny(keep=(1,))), {"x": tiny.examples(6)}
    with open_session(model, 1) as cpu, open_session(model, 1, Execution("openvino")) as other:
        np.testing.assert_allclose(other.run(feeds)["logits"], cpu.run(feeds)["logits"], rtol=1e-5, atol=1e-6)
    with open_session(model, 1, Execution("openvino", cache=tmp_path / "cache")):
        assert [path.suffix for path in (tmp_path / "cache").glob("*/*")] == [".blob"]


@OPENVINO
def test_openvino_leaves_no_node_to_the_cpu_unless_it_may(tmp_path, caplog):
    text = (
        '<ir_version: 10, opset_import: ["" : 20]> g (float[n, m, m] x) => (float[n] y) { d = Det(x) \n y = Relu(d) }'
    )
    path = tmp_path / "det.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    what = f"1 of 2 nodes of {path} run on the CPU, not on openvino: Det 1"
    assert refusal(path, Execution("openvino")).partition("\n")[0] == what
    with open_session(path, 1, Execution("openvino", cpu_fallback=True)) as session:
        assert session.run({"x": np.stack([2 * np.eye(2, dtype=np.float32)] * 3)})["y"].tolist() == [4, 4, 4]
    assert caplog.messages == [what]
