"""Form ``qmoe``: float experts quantised on the way, every router, and what the proof says of it."""

import dataclasses

import numpy as np
import onnx
import pytest

from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from graph_passes.quantization import quantize
from graph_passes.quantization.quantize import Quantization, rounded
from graph_passes.weights.weight import bits_of
from moe_spec.errors import UserError, VerificationError
from moe_spec.identity import onnx_sha256
from moe_spec.manifest import MODEL, Manifest
from tests.graph_passes.block_models import ROUTERS, Spec, plan, why_not
from tests.graph_passes.block_models.kinds import spec_of
from tests.graph_passes.readers.proofs import THREE, saved
from tests.zoo import RUNNER

WIDE = {"hidden": 128, "width": 128, "opset": 21}
WAYS = [Precision("int8"), Precision("int4"), *(Precision("int4", block_size=size) for size in (32, 64, 128))]
HOW = Precision("int4", block_size=32)
NOT_GATED = ("llama4", "vmoe", "switch_capacity", "nllb_capacity", "own_scales")
GATED = [name for name in ROUTERS if name not in NOT_GATED]


def source_of(router: str, **fields) -> Spec:
    form = "stacked" if "gates" in ROUTERS[router] else "batched_mm"
    return spec_of(form, router, **{**WIDE, **fields})


def quantised(spec: Spec, folder, how: Precision, form: str = "qmoe", keep=THREE) -> Manifest:
    source = saved(spec, folder)
    made = plan(spec, keep, onnx_sha256(source))
    return optimize(source, folder / "out", RUNNER, plan=made, form=form, precision=how)


@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.experts}, {how.block_size}")
@pytest.mark.parametrize("form", ["qmoe", "sorted", "dense"])
def test_the_result_is_exact_beside_its_rounded_experts_and_the_error_is_told(tmp_path, how, form):
    manifest = quantised(source_of("softmax_renormalised", biased=True), tmp_path, how, form)
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    assert manifest.details["precision"] == dataclasses.asdict(how)
    assert 1e-4 < manifest.details["precision_error"] < (0.05 if how.experts == "int8" else 0.5)
    before = read_model(tmp_path / "block.onnx").blocks[0].experts
    after = read_model(tmp_path / "out").blocks[0].experts
    rounding = how.quantization
    assert rounding is not None
    wanted = rounded(before, rounding)
    for weight, reference in ((after.up_EHF, wanted.up_EHF), (after.down_EFH, wanted.down_EFH)):
        assert weight.scales is not None
        scales = weight.scales.load()
        scales = np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1)
        middle = 0 if weight.zero_points is None else 2 ** (bits_of(weight.dtype) - 1)
        steps = weight.values.load().astype(np.float32) - middle
        np.testing.assert_array_equal(steps * scales, reference.load()[list(THREE)])


@pytest.mark.parametrize("router", GATED)
def test_every_router_is_expressed(tmp_path, router):
    spec = source_of(router, hidden=32, width=32)
    assert why_not(spec) is None
    manifest = quantised(spec, tmp_path, Precision("int8"), keep=(0, 1, 4, 5))
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 1e-5
    (block,) = read_model(tmp_path / "out").blocks
    assert (block.form, block.num_experts) == ("qmoe", 4)
    again = optimize(tmp_path / "out", tmp_path / "again", RUNNER)
    assert again.modified == bool(again.details["unreachable"])  # a bias may put an expert out of reach


def test_experts_take_a_quarter_and_an_eighth_of_the_bytes(tmp_path):
    sizes = []
    for name in (None, "int8", "int4"):
        folder = tmp_path / str(name)
        folder.mkdir()
        source = saved(source_of("softmax_renormalised"), folder)
        form = "moe" if name is None else "qmoe"
        optimize(source, folder / "out", RUNNER, form=form, precision=Precision(name))
        sizes.append(read_model(folder / "out").blocks[0].experts.up_EHF.values.nbytes)
    assert (sizes[0] // sizes[1], sizes[0] // sizes[2]) == (4, 8)


@pytest.mark.parametrize("form", ["qmoe", "sorted", "dense"])
def test_experts_in_float16_stay_so_between_their_products(tmp_path, form):
    spec = spec_of("experts", "softmax_renormalised", **WIDE, dtype="float16")
    manifest = quantised(spec, tmp_path, HOW, form)
    assert {entry["dtype"] for entry in manifest.details["oracle"]} == {"float16"}
    assert max(entry["max_rel"] for entry in manifest.details["oracle"]) <= 2e-3


@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.experts}, {how.block_size}")
@pytest.mark.parametrize("form", ["qmoe", "sorted", "dense"])
def test_twice_is_once(tmp_path, how, form):
    quantised(source_of("softmax_renormalised"), tmp_path, how, form)
    again = optimize(tmp_path / "out", tmp_path / "again", RUNNER, form=form, precision=how)
    assert not again.modified
    assert (tmp_path / "again" / MODEL).read_bytes() == (tmp_path / "out" / MODEL).read_bytes()


def test_routers_and_biases_are_never_quantised(tmp_path):
    quantised(source_of("topk_first", biased=True), tmp_path, HOW)
    model = onnx.load(tmp_path / "out" / MODEL)
    (node,) = (node for node in model.graph.node if node.op_type == "QMoE")
    types = {value.name: value.data_type for value in model.graph.initializer}
    packed = {name for name, dtype in types.items() if dtype == onnx.TensorProto.UINT8}
    assert packed == {node.input[2], node.input[5]}


def test_another_rounding_than_was_asked_for_fails_the_proof(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "graph_passes.rewrite.quantized", lambda experts, how: quantize.quantized(experts, Quantization(how.format, 64))
    )
    with pytest.raises(VerificationError):
        quantised(source_of("softmax_renormalised"), tmp_path, HOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "how", "what"),
    [
        (
            {"hidden": 48},
            HOW,
            "layer layers.0.mlp cannot be quantised to int4: H=48 and F=128 are no multiples of the block size 32",
        ),
        (
            {},
            Precision("int8", block_size=32),
            "form qmoe cannot express layer layers.0.mlp: the CPU kernel rounds what it reads to 8 bits where weights "
            "of 8 bits have blocks",
        ),
        (
            {"quantization": "int8"},
            HOW,
            "layer layers.0.mlp cannot be quantised to int4: its weights are quantised already",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused(tmp_path, fields, how, what):
    with pytest.raises(UserError) as error:
        quantised(source_of("softmax_renormalised", **fields), tmp_path, how)
    assert error.value.what == what
    assert not (tmp_path / "out").exists()


def test_float_experts_need_to_be_told_how(tmp_path):
    source = saved(source_of("softmax"), tmp_path)
    with pytest.raises(UserError) as error:
        optimize(source, tmp_path / "out", RUNNER, form="qmoe")
    assert error.value.what == (
        "form qmoe cannot express layer layers.0.mlp: its weights are not quantised; --precision int8 or int4 says how"
    )


def test_factors_of_experts_of_their_own_are_not_expressed(tmp_path):
    with pytest.raises(UserError) as error:
        quantised(source_of("own_scales"), tmp_path, Precision("int8"))
    assert error.value.what == (
        "form qmoe cannot express layer layers.0.mlp: the op ranks what weighs the experts, "
        "and here each has a factor of its own"
    )
