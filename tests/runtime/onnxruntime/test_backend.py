import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from moe_spec.errors import UserError
from moe_spec.manifest import Manifest, TensorSpec
from runtime.backend import BuildOptions
from runtime.backends import open_session
from runtime.onnxruntime.backend import OnnxRuntimeBackend, OnnxRuntimeRunner
from runtime.profiles import ShapeRange
from runtime.targets import find_target
from tests.runtime import tiny

CPU = find_target("onnxruntime-cpu")
MAPS = Path("/proc/self/maps")


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def test_a_directory_and_its_onnx_file_are_the_same_session(model):
    feeds = {"x": tiny.examples(3)}
    with open_session(model) as directory, open_session(model / "model.onnx", threads=1) as file:
        assert directory.inputs == file.inputs == (TensorSpec("x", "float32", ("batch", "sequence", 8)),)
        assert directory.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)
        np.testing.assert_array_equal(directory.run(feeds)["logits"], file.run(feeds)["logits"])


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists what a process has mapped")
def test_weights_are_mapped_from_their_file_while_a_session_is_open(model, tmp_path):
    """What a kernel does not pack for itself stays in the file: experts that are picked by Gather, embeddings."""
    OnnxRuntimeBackend(threads=1).build(model, CPU, BuildOptions(), tmp_path / "engine")
    for directory in (model, tmp_path / "engine"):
        with open_session(directory):
            assert f"{directory}/model.onnx.data" in MAPS.read_text()
        assert f"{directory}/model.onnx.data" not in MAPS.read_text()


def test_outputs_are_those_asked_for(model):
    with open_session(model / "observed.onnx") as session:
        assert list(session.run({"x": tiny.examples(1)}, ["scores_1", "logits"])) == ["scores_1", "logits"]
        message = (
            f"{model}/observed.onnx has no output gate, its outputs are logits, gates_0, scores_0, gates_1, scores_1"
        )
        with pytest.raises(UserError, match=re.escape(message)):
            session.run({"x": tiny.examples(1)}, ["gate"])


def test_the_runner_gives_outputs_of_every_batch(model):
    batches = [{"x": tiny.examples(1)}, {"x": tiny.examples(4, sequence=2)}]
    everything = OnnxRuntimeRunner(threads=1).run(model / "observed.onnx", batches)
    assert [outputs["gates_0"].shape for outputs in everything] == [(5, 4), (8, 4)]
    (some, _) = OnnxRuntimeRunner(threads=1).run(model / "observed.onnx", batches, ["logits"])
    np.testing.assert_array_equal(some["logits"], everything[0]["logits"])


def test_an_engine_computes_what_its_model_computes(model, tmp_path):
    backend = OnnxRuntimeBackend(threads=1)
    manifest = backend.build(model, CPU, BuildOptions(), tmp_path / "engine")
    assert manifest == Manifest.load(tmp_path / "engine")
    assert (manifest.kind, manifest.details["target"]) == ("engine", "onnxruntime-cpu")
    with open_session(tmp_path / "engine") as engine, open_session(model) as graph:
        feeds = {"x": tiny.examples(6)}
        np.testing.assert_allclose(engine.run(feeds)["logits"], graph.run(feeds)["logits"], rtol=0, atol=1e-6)


def test_an_engine_is_built_the_same_twice(model, tmp_path):
    for name in ("one", "two"):
        OnnxRuntimeBackend().build(model, CPU, BuildOptions(), tmp_path / name)
    assert Manifest.load(tmp_path / "one") == Manifest.load(tmp_path / "two")


def test_an_engine_of_another_version_is_refused_with_the_command_that_rebuilds_it(model, tmp_path):
    engine = tmp_path / "engine"
    OnnxRuntimeBackend().build(model, CPU, BuildOptions(), engine)
    text = (engine / "manifest.json").read_text()
    (engine / "manifest.json").write_text(text.replace(f'"{onnxruntime.__version__}"', '"1.0.0"'))
    message = (
        f"{engine} was built with onnxruntime 1.0.0, but {onnxruntime.__version__} is installed; engines are not "
        "portable\nhint: build it again: moe-edge build MODEL_DIRECTORY -o ENGINE_DIRECTORY --target onnxruntime-cpu"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        open_session(engine)


def test_an_engine_whose_bytes_changed_is_refused(model, tmp_path):
    engine = tmp_path / "engine"
    OnnxRuntimeBackend().build(model, CPU, BuildOptions(), engine)
    data = bytearray((engine / "model.onnx.data").read_bytes())
    data[5] ^= 1
    (engine / "model.onnx.data").write_bytes(data)
    message = (
        f"{engine}/model.onnx.data is not the file that manifest.json describes (sha256 differs)\n"
        "hint: build it again: moe-edge build MODEL_DIRECTORY -o ENGINE_DIRECTORY --target onnxruntime-cpu"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        open_session(engine)


def test_a_profile_is_not_for_onnx_runtime(model, tmp_path):
    options = BuildOptions(({"x": ShapeRange((1, 1, 8), (1, 1, 8), (1, 1, 8))},))
    message = (
        "ONNX Runtime takes any shape and none of TensorRT's options: --minShapes=x:1x1x8 --optShapes=x:1x1x8 "
        "--maxShapes=x:1x1x8\n"
        "hint: leave these options out, or give a TensorRT target"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        OnnxRuntimeBackend().build(model, CPU, options, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_missing_model_is_named(tmp_path):
    message = f"{tmp_path}/no does not exist, expected an .onnx file or a model directory\nhint: check the path"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        open_session(tmp_path / "no")
    message = f"{tmp_path} is no model directory: it has no model.onnx\nhint: give what export or optimize wrote"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        open_session(tmp_path)


def test_a_graph_that_onnx_runtime_cannot_load_is_an_error_with_its_reason(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) { y = NoSuchOp(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "bad.onnx")
    with pytest.raises(UserError, match=r"bad.onnx cannot be loaded: .*NoSuchOp.*\nhint: copy or export"):
        open_session(tmp_path / "bad.onnx")


NO_BFLOAT16 = (
    "ONNX Runtime has next to no kernels for it on a CPU: export for here with --dtype fp32; bfloat16 is for TensorRT, "
    "moe-edge optimize --no-prove and build --target rtx-ada"
)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "w = Constant <value = bfloat16[1] {1}> () \n z = Add(x, w) \n y = Cast <to = 1> (z)",
            "cannot be loaded: .*; it computes in bfloat16",
        ),
        ("y = Cast <to = 1> (x)", "x of .* is bfloat16, which numpy lacks"),
    ],
)
def test_a_graph_of_bfloat16_is_refused_with_the_way_round(body, reason, tmp_path):
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (bfloat16[n] x) => (float[n] y) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "half.onnx")
    with pytest.raises(UserError, match=reason) as caught:
        open_session(tmp_path / "half.onnx")
    assert caught.value.hint == NO_BFLOAT16


def test_weights_in_bfloat16_that_are_cast_run_as_ever(tmp_path):
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [1], [2.0])
    body = "v = Cast <to = 1> (w) \n y = Mul(x, v)"
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[n] x) => (float[n] y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "cast.onnx")
    with open_session(tmp_path / "cast.onnx") as session:
        assert session.run({"x": np.ones(3, np.float32)})["y"].tolist() == [2, 2, 2]


def test_a_run_that_fails_inside_the_graph_is_an_error_with_its_reason(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[n] x, float[m] z) => (float[k] y) { y = Add(x, z) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "add.onnx")
    with (
        open_session(tmp_path / "add.onnx") as session,
        pytest.raises(UserError, match=r"add.onnx cannot run on these inputs: .*\nhint: check the lengths"),
    ):
        session.run({"x": np.zeros(2, np.float32), "z": np.zeros(3, np.float32)})
