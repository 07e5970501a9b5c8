"""Damaged graphs: always a clear error, or a graph that was proven; never a traceback, a hang or half an output."""

import random
from zlib import crc32

import onnx
import pytest

from graph_passes.describe import inspect_model, read_model
from graph_passes.optimize import optimize
from moe_spec.errors import UserError, VerificationError
from moe_spec.feasibility import Groups
from tests.graph_passes.block_models import NAME, Spec, plan, save
from tests.graph_passes.block_models.kinds import FORM_FIELDS
from tests.graph_passes.damage import DAMAGE
from tests.zoo import RUNNER

FORMS = ("batched_mm", "stacked", "masked_loop", "nonzero", "grouped", "dispatch", "moe", "qmoe")
SPECS = {
    "experts": Spec(biased=True, router_bias=True),
    "groups": Spec(score="sigmoid", selection_bias=True, renormalize=True, groups=Groups(2, 1), scale=2.5),
    "top-k first": Spec(topk_first=True, interleaved=True, transposed=True),
    **{form: Spec(form=form, **FORM_FIELDS.get(form, {})) for form in FORMS},
}
SEEDS = 2


def prune(path, out) -> None:
    optimize(path, out, RUNNER, plan=plan(SPECS["experts"], (0, 2, 5), ""), any_model=True, form="dense")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("spec", SPECS)
def test_damage_ends_in_an_error_or_in_a_proven_graph(tmp_path, damage, spec):
    path = tmp_path / "block.onnx"
    for seed in range(SEEDS):
        out = tmp_path / f"out-{seed}"
        save(SPECS[spec], path)
        model = onnx.load(path)
        DAMAGE[damage](model, random.Random(seed + crc32(spec.encode())))
        onnx.save(model, path)
        try:
            prune(path, out)
        except (UserError, VerificationError):
            assert not out.exists()
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize("spec", ["experts", "batched_mm", "masked_loop"])
@pytest.mark.parametrize("left", [0, 1, 999, None])
def test_external_data_that_is_cut_or_missing_is_an_error(tmp_path, spec, left):
    path, data = tmp_path / "block.onnx", tmp_path / "weights"
    save(SPECS[spec], path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0)
    if left is None:
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:left])
    with pytest.raises(UserError, match=r"does not exist, but weight|the file is cut"):
        prune(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda model: model.graph.node[0].input.__setitem__(0, "y"), "node Gemm reads 'y', which nothing gives"),
        (lambda model: model.graph.node[0].output.__setitem__(0, "x"), "the value 'x' is given twice"),
        (lambda model: model.graph.output[0].__setattr__("name", "y"), "nothing gives the output 'y'"),
        (lambda model: model.graph.input[0].ClearField("type"), "'x' is no tensor of a known type"),
        (
            lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"),
            "does not say how many axes its input 'x' has",
        ),
        (
            lambda model: model.opset_import[0].__setattr__("version", -3),
            "is written for the opset -3, which cannot be",
        ),
    ],
    ids=["unknown value", "value given twice", "unknown output", "untyped input", "input of any rank", "opset"],
)
def test_what_is_wrong_is_named(tmp_path, edit, what):
    path = tmp_path / "block.onnx"
    save(Spec(), path)
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)
    with pytest.raises(UserError) as error:
        inspect_model(path)
    assert error.value.what.removeprefix(f"{path}").lstrip(": ") == what


@pytest.mark.parametrize("shape", [(1 << 60,), (1 << 32, 1 << 32), (-1, 8), (-1, -8)])
def test_a_size_that_no_weight_has_is_refused_before_anything_is_allocated(tmp_path, shape):
    path = tmp_path / "block.onnx"
    save(Spec(), path)
    model = onnx.load(path)
    model.graph.initializer[0].dims[:] = shape
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"needs \d+|cannot be negative"):
        inspect_model(path)


def test_an_export_that_lost_experts_is_detected(tmp_path):
    """The router has 8 rows, the graph holds 5 experts (tracing can lose those that no example token chose)."""
    path = tmp_path / "block.onnx"
    save(Spec(experts=5), path)
    lost = onnx.load(path)
    save(Spec(experts=8), path)
    whole = onnx.load(path)
    kept = {tensor.name: tensor for tensor in lost.graph.initializer if ".experts." in tensor.name}
    for tensor in whole.graph.initializer:
        if tensor.name in kept:
            tensor.CopyFrom(kept[tensor.name])
    onnx.save(whole, path)
    assert [layer.refusals[0].reason for layer in inspect_model(path).unrecognised] == [
        "the router chooses among 8 experts that read 8 channels, there are 5 that read 8"
    ]


def test_a_computed_weight_is_refused(tmp_path):
    path = tmp_path / "block.onnx"
    save(Spec(), path)
    model = onnx.load(path)
    model.graph.node.insert(0, onnx.helper.make_node("Identity", [f"{NAME}.experts.up"], ["computed"]))
    model.graph.node[-1].input[3] = "computed"
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"experts: a weight is no constant \(at Identity 'computed'\)"):
        read_model(path)
