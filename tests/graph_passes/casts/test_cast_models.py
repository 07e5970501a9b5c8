"""Models cast on the way through `optimize`: what they are afterwards, what the proof says, what it refuses."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch

import graph_passes.casts.rewrite as rewrite
from exporter.export import export
from graph_passes.describe import read_model
from graph_passes.optimize import optimize
from graph_passes.precision import Precision
from graph_passes.proof.choices import ChoiceEntry
from graph_passes.proof.feeds import random_batches
from graph_passes.quantization.activations import Activations
from models.vmoe.assets import fashion_mnist
from moe_spec.errors import UserError, VerificationError
from moe_spec.layer_plan import LayerPlan
from moe_spec.manifest import MODEL, Manifest
from moe_spec.plan import PruningPlan
from moe_spec.runner import error_between
from runtime.verification.sides import Side
from tests.graph_passes.block_models import Spec
from tests.graph_passes.readers.proofs import saved
from tests.sample_models import SAMPLE_MODELS
from tests.zoo import RUNNER

FP16 = Precision("fp16", "fp16")
EXPERTS = ("dense", "gather", "ffn")


@pytest.fixture(scope="module")
def half(zoo, tmp_path_factory):
    """Mixtral with its cache, cast, in the form that TensorRT takes."""
    out = tmp_path_factory.mktemp("casts") / "half"
    return out, optimize(zoo.cached("mixtral"), out, RUNNER, precision=FP16, accepted=EXPERTS)


def constants_of(path):
    model = onnx.load(path / MODEL)
    return {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}


def test_the_cache_is_half_as_large_and_the_logits_stay_what_they_were(half):
    _, manifest = half
    dtypes = {spec.name: spec.dtype for spec in (*manifest.inputs, *manifest.outputs)}
    assert {name: dtype for name, dtype in dtypes.items() if "float" in dtype} == {
        "logits": "float32",
        **{f"{side}.{layer}.{kind}": "float16" for side in ("past_key_values", "present") for layer in (0, 1)
           for kind in ("key", "value")},
    }  # fmt: skip


def test_routers_and_norms_stay_float32(half):
    path, _ = half
    constants = constants_of(path)
    wide = {name for name, value in constants.items() if value.dtype == np.float32 and value.size > 1}
    assert {name.split(".")[-1] for name in wide if "norm" in name} == {"weight"}
    assert sum("norm" in name for name in wide) == 5
    assert sum(name.endswith("router.weight") or "gate" in name for name in wide) == 2
    assert not any("experts" in name or "attn" in name or "embed" in name for name in wide)


def test_the_proof_tells_rewriting_from_rounding(half):
    _, manifest = half
    casts = manifest.details["casts"]
    assert max(entry["max_rel"] for entry in casts["rewrite"]) <= 1e-6
    assert 0 < max(entry["max_rel"] for entry in casts["low"]) <= 5e-3
    assert manifest.details["not_run"] == []
    assert casts["error"] > 1e-4
    assert 0 < casts["largest"]["magnitude"] < 65504
    assert manifest.details["precision"] == dataclasses.asdict(FP16)
    assert Manifest.load(half[0]) == manifest
    assert manifest.passes[-1].name == "cast-floats"
    assert manifest.passes[-1].bytes_after < 0.55 * manifest.passes[-1].bytes_before


def test_it_is_judged_as_float16(half):
    path, _ = half
    side = Side.open(path, threads=1)
    with side.session:
        assert side.precision() == "float16"


def test_twice_is_once_and_another_precision_is_refused(half, tmp_path):
    path, _ = half
    again = optimize(path, tmp_path / "again", RUNNER, precision=FP16, accepted=EXPERTS, prove=False)
    assert not again.modified
    assert (tmp_path / "again" / MODEL).read_bytes() == (path / MODEL).read_bytes()
    assert again.details["precision"] == dataclasses.asdict(FP16)
    with pytest.raises(UserError) as refusal:
        optimize(path, tmp_path / "out", RUNNER, precision=Precision("bf16"))
    assert (refusal.value.what, refusal.value.hint) == (
        f"{path / MODEL} is of halves already, and casts start from float32",
        "optimise the float32 model with --precision and --rest-precision; moe-edge export writes one",
    )


def test_it_is_what_the_exporter_gives_in_float16_but_for_the_norms_weights(zoo, tmp_path):
    exported, cast = tmp_path / "exported", tmp_path / "cast"
    export(zoo.decoder("mixtral"), exported, RUNNER, dtype=torch.float16)
    optimize(zoo.cached("mixtral"), cast, RUNNER, precision=FP16, prove=False)
    theirs, ours = constants_of(exported), constants_of(cast)
    for name in theirs.keys() & ours.keys():
        if theirs[name].dtype == np.float16 and "norm" not in name and theirs[name].ndim:
            np.testing.assert_array_equal(theirs[name], ours[name], strict=True)
    model = read_model(cast)
    feeds = random_batches(model.graph, model.blocks)[:2]
    for wanted, found in zip(*(RUNNER.run(path / MODEL, feeds) for path in (exported, cast)), strict=True):
        assert max(error_between(wanted[name], found[name])[1] for name in wanted) <= 5e-3


def test_bfloat16_is_proven_as_a_float32_graph_and_the_manifest_says_so(zoo, tmp_path):
    manifest = optimize(
        zoo.exported("vmoe"), tmp_path / "out", RUNNER, precision=Precision("bf16", "bf16"), form="dense"
    )
    casts = manifest.details["casts"]
    assert casts["low"] == []
    assert manifest.details["not_run"] == [
        "bfloat16, of which ONNX Runtime has no kernels on a CPU: the float32 graph of the rounded weights was"
    ]
    assert max(entry["max_rel"] for entry in casts["rewrite"]) <= 1e-6
    assert casts["largest"] is None


def test_where_every_batch_has_a_flip_no_output_is_judged_and_the_manifest_says_so(tmp_path, monkeypatch):
    def flipped(watched, *_):
        return ChoiceEntry(watched.result.name, 2, 1, None)

    monkeypatch.setattr("graph_passes.casts.proof.compare_choice", flipped)
    manifest = optimize(saved(Spec(), tmp_path), tmp_path / "out", RUNNER, precision=Precision("fp16"))
    assert manifest.details["casts"]["low"] == []
    assert manifest.details["not_run"] == [
        "a comparison of outputs in float16: for all random inputs a router chose otherwise than in float32"
    ]


@pytest.mark.parametrize(
    ("asked", "experts", "rest"),
    [(Precision("fp16"), "float16", "float32"), (Precision("fp32", "fp16"), "float32", "float16")],
)
def test_experts_and_the_rest_are_asked_for_apart(zoo, tmp_path, asked, experts, rest):
    optimize(zoo.exported("mixtral"), tmp_path / "out", RUNNER, precision=asked, form="sorted", prove=False)
    constants = constants_of(tmp_path / "out")
    of_experts = {value.dtype.name for name, value in constants.items() if "experts" in name}
    of_rest = {value.dtype.name for name, value in constants.items() if "attn" in name or "lm_head" in name}
    assert (of_experts, of_rest) == ({experts}, {rest})


def test_int8_activations_are_rounded_before_the_rest_is_cast(zoo, tmp_path):
    exported = SAMPLE_MODELS["pruned"].make(zoo)
    activations = Activations.load("int8", fashion_mnist() / "calibration.npz", exported)
    asked = Precision("int8", "fp16")
    manifest = optimize(exported, tmp_path / "out", RUNNER, precision=asked, activations=activations, form="dense")
    assert [entry.name for entry in manifest.passes[-2:]] == ["round-activations", "cast-floats"]
    assert max(entry["max_rel"] for entry in manifest.details["casts"]["rewrite"]) <= 1e-6
    model = onnx.load(tmp_path / "out" / MODEL)
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    constants = constants_of(tmp_path / "out")
    assert scales
    assert {constants[name].dtype.name for name in scales} <= {"float16", "float32"}


def scaled(spec, folder, factor):
    """The model of ``spec`` with its experts' weights times ``factor``."""
    path = saved(spec, folder)
    model = onnx.load(path)
    for value in model.graph.initializer:
        weights = onnx.numpy_helper.to_array(value)
        if weights.ndim == 3:
            value.CopyFrom(onnx.numpy_helper.from_array(weights * np.float32(factor), value.name))
    onnx.save(model, path)
    return path


def test_a_model_beyond_float16_is_refused_and_the_product_is_named(tmp_path):
    source = scaled(Spec(form="stacked"), tmp_path, 1000)
    with pytest.raises(VerificationError) as refusal:
        optimize(source, tmp_path / "out", RUNNER, precision=FP16, form="dense")
    assert "reaches" in str(refusal.value)
    assert str(refusal.value).endswith("float16 ends at 65504; nothing was written; bf16 has the range of float32")
    assert not (tmp_path / "out").exists()
    optimize(source, tmp_path / "out", RUNNER, precision=Precision("bf16", "bf16"), form="dense")


def test_a_weight_that_is_cast_wrongly_fails_the_proof(zoo, tmp_path, monkeypatch):
    right = rewrite.narrowed
    monkeypatch.setattr(
        rewrite, "narrowed", lambda weight, to, name: right(weight.map(weight.shape, lambda x: x * 1.01), to, name)
    )
    with pytest.raises(VerificationError, match="computed in float32, differs from the float32 graph with rounded"):
        optimize(zoo.exported("mixtral"), tmp_path / "out", RUNNER, precision=FP16)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_what_is_cast_is_read_pruned_and_observed_like_any_other(zoo, tmp_path, form):
    cast = tmp_path / "cast"
    manifest = optimize(
        zoo.cached("mixtral"), cast, RUNNER, precision=FP16, form=form, forced=True, observe_experts=True
    )
    assert len(manifest.details["forced"]) == len(manifest.details["experts"]) == 2
    layers = tuple(LayerPlan(block.name, block.experts, block.top_k, (0, 1, 4, 6)) for block in manifest.blocks)
    plan = PruningPlan(manifest.model_sha256, "by hand", layers)
    again = optimize(cast, tmp_path / "pruned", RUNNER, plan=plan)
    assert [(block.form, block.experts) for block in again.blocks] == [(form, 4)] * 2
    assert max(entry["max_rel"] for entry in again.details["oracle"]) <= 2e-3
    assert again.details["precision"] == dataclasses.asdict(FP16)
