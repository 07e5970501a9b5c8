"""The options of `optimize` for fused ops, quantised experts and forced routing, as a user types them."""

import json
import re

import onnx
import pytest

from tests.cli.helpers import invoke
from tests.graph_passes.block_models import NAME, Spec, save


@pytest.fixture
def block(tmp_path):
    path = tmp_path / "block.onnx"
    save(Spec(hidden=64, width=32), path)
    return path


def ops(path) -> set[str]:
    return {node.op_type for node in onnx.load(path / "model.onnx").graph.node}


def test_experts_are_quantised_and_the_line_says_what_that_costs(block, tmp_path):
    code, out, _ = invoke(
        "optimize", block, "--form", "qmoe", "--precision", "int4", "--block-size", 32, "-o", tmp_path / "out"
    )
    assert code == 0
    first, layer = out.splitlines()
    number = r"\d\.\de[-+]\d\d"
    assert re.fullmatch(
        rf"{tmp_path / 'out'}: proven to {number} beside the rounded experts; "
        rf"quantising changes outputs by up to {number} of their range",
        first,
    )
    assert layer == f"  {NAME}: 8 experts, K=2, qmoe, 32,768 bytes"
    assert "QMoE" in ops(tmp_path / "out")


def test_the_same_for_machines(block, tmp_path):
    code, out, _ = invoke("optimize", block, "--form", "qmoe", "--precision", "int8", "--json", "-o", tmp_path / "out")
    details = json.loads(out)["details"]
    assert (code, details["precision"]) == (0, {"experts": "int8", "rest": None, "block_size": None})
    assert 0 < details["precision_error"] < 0.05


@pytest.mark.parametrize(
    ("name", "run", "end"), [("fp16", ", to {n} when run", ""), ("bf16", "", "; not run: bfloat16, .*")]
)
def test_casts_are_proven_and_the_line_says_what_rounding_costs(block, tmp_path, name, run, end):
    asked = ("--precision", name, "--rest-precision", name)
    code, out, _ = invoke("optimize", block, "--form", "dense", *asked, "-o", tmp_path / "out")
    assert code == 0
    number = r"\d\.\de[-+]\d\d"
    assert re.fullmatch(
        rf"{tmp_path / 'out'}: proven to {number}; casts to {number} beside rounded weights in float32"
        rf"{run.replace('{n}', number)}; rounding changes outputs by up to {number} of their range{end}",
        out.splitlines()[0],
    )


def test_the_forms_of_onnx_runtime_are_offered_for_its_target_only(block, tmp_path):
    assert invoke("optimize", block, "--form", "moe", "--target", "cpu", "-o", tmp_path / "out")[0] == 0
    assert "MoE" in ops(tmp_path / "out")
    code, _, error = invoke("optimize", block, "--form", "moe", "--target", "sm89", "-o", tmp_path / "no")
    assert (code, error) == (
        1,
        "error: the target does not take form 'moe'\nhint: it takes: dense, gather, ffn\n",
    )


def test_forced_routing_is_one_more_file(block, tmp_path):
    code, _, _ = invoke("optimize", block, "--form", "sorted", "--forced", "-o", tmp_path / "out")
    assert code == 0
    inputs = [value.name for value in onnx.load(tmp_path / "out" / "forced.onnx").graph.input]
    assert inputs == ["x", f"{NAME}/forced/ids", f"{NAME}/forced/weights"]


def test_observed_experts_are_one_more_file(block, tmp_path):
    code, _, _ = invoke("optimize", block, "--observe-experts", "-o", tmp_path / "out")
    assert code == 0
    outputs = [value.name for value in onnx.load(tmp_path / "out" / "experts.onnx").graph.output]
    assert outputs == ["out", *(f"{NAME}/observed/{label}" for label in ("logits", "ids", "weights", "norms"))]


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (
            ("--precision", "int5"),
            "unknown precision 'int5'",
            "did you mean 'int8'? known: bf16, fp16, fp32, fp8, int4, int8, nvfp4",
        ),
        (
            ("--precision", "int4", "--block-size", 33),
            "there are no blocks of 33 inputs",
            "--block-size is one of 32, 64, 128",
        ),
    ],
)
def test_a_wish_that_cannot_be_is_refused(block, tmp_path, options, what, hint):
    code, out, error = invoke("optimize", block, *options, "-o", tmp_path / "out")
    assert (code, out, error) == (1, "", f"error: {what}\nhint: {hint}\n")
    assert not (tmp_path / "out").exists()
