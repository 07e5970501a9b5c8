import re

import pytest

from moe_spec.errors import UserError
from moe_spec.manifest import Manifest
from runtime.backend import BuildOptions
from runtime.build import build
from runtime.profiles import ShapeRange
from runtime.targets import find_target
from tests.runtime import tiny

CPU, ADA = find_target("onnxruntime-cpu"), find_target("rtx-ada")


@pytest.fixture
def model(tmp_path):
    return tiny.write(tmp_path / "model")


def refuses(model, target, out, message):
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build(model, target, BuildOptions(), out)
    assert sorted(out.parent.iterdir()) == before


def test_an_existing_output_is_never_overwritten(model, tmp_path):
    (tmp_path / "engine").mkdir()
    out = tmp_path / "engine"
    refuses(model, CPU, out, f"{out} already exists\nhint: give another -o, or remove it first: rm -r {out}")


def test_a_missing_model_is_named(tmp_path):
    model = tmp_path / "no"
    refuses(
        model,
        ADA,
        tmp_path / "engine",
        f"{model} does not exist, expected an .onnx file or a model directory\nhint: check the path",
    )


def test_an_onnx_file_alone_is_sent_through_optimize(model, tmp_path):
    file = model / "model.onnx"
    refuses(
        file,
        ADA,
        tmp_path / "engine",
        f"{file} is no model directory: it has no manifest.json\n"
        f"hint: make one: moe-edge optimize {file} -o DIRECTORY --target rtx-ada",
    )


def test_an_engine_is_not_built_from_an_engine(model, tmp_path):
    build(model, CPU, BuildOptions(), tmp_path / "first")
    refuses(
        tmp_path / "first",
        CPU,
        tmp_path / "second",
        f"{tmp_path}/first is an engine already\nhint: give the model directory that it was built from",
    )


def test_weights_that_were_cut_are_named(model, tmp_path):
    path = model / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    refuses(
        model,
        ADA,
        tmp_path / "engine",
        f"{path} has 8543 bytes, manifest.json says 8544\nhint: make the directory again with the command that made it",
    )


def test_a_form_or_format_that_the_target_lacks_is_refused_with_targets_that_take_it(model, tmp_path):
    manifest = Manifest.load(model)
    text = (model / "manifest.json").read_text()
    (model / "manifest.json").write_text(text.replace('"form": "dense"', '"form": "sorted"'))
    assert Manifest.load(model) != manifest
    refuses(
        model,
        ADA,
        tmp_path / "engine",
        f"{model} cannot be built for rtx-ada: layer blocks.0.moe has the form 'sorted', rtx-ada takes dense, gather, "
        "ffn; layer blocks.1.moe has the form 'sorted', rtx-ada takes dense, gather, ffn\n"
        "hint: as it is, it can be built here for onnxruntime-cpu, onnxruntime-arm64; write a graph for it: "
        f"moe-edge optimize {model} -o DIRECTORY --target rtx-ada",
    )


def test_what_no_such_device_can_hold_is_refused_before_any_work(model, tmp_path):
    profile = {"x": ShapeRange((1, 1, 8), (1, 1, 8), (1 << 20, 1 << 14, 8))}
    message = (
        f"{model} needs 549.8 GB at its largest shapes (weights 0.0, cache 0.0), the largest rtx-ada has 48 GB\n"
        f"hint: keep fewer experts, quantise them, or give smaller --maxShapes: moe-edge targets {model}"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build(model, ADA, BuildOptions((profile,)), tmp_path / "engine")
